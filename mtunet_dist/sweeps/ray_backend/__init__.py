"""Ray Tune: searchers, schedulers and trials. Only this folder imports Ray."""
