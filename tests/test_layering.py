"""The direction of dependencies, read from the imports themselves."""

from __future__ import annotations

import ast
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
PACKAGE = REPOSITORY / "mtunet_dist"

# Each layer may import the ones above it and its own. First match wins; a file that matches none fails the test.
LAYERS = [
    ["errors", "system"],
    ["plugins", "distributed"],
    ["config"],
    ["tasks", "models", "synthetic"],
    ["weightings", "sources"],
    ["core"],
    ["data"],
    ["strategies"],
    ["runs"],
    ["train", "evaluate", "predict", "export", "prepare", "summary", "synthesize"],
    ["launching"],
    ["reproduction", "sweeps"],
    ["launch", "reproduce", "sweep"],
    ["slurm"],
    ["submit", "status"],
    ["cli"],
]
ONLY_IN = {
    "nvidia": ("data.dali",),
    "omegaconf": ("config.typed_yaml",),
    "deepspeed": ("strategies.deepspeed",),
    "h5py": ("sources.nyuv2_mat",),
    "ray": ("sweeps.ray_backend.",),
    "optuna": ("sweeps.ray_backend.", "sweeps.report.importance"),
    "tensorboard": ("sweeps.report.hparams",),
}
VERBS = {
    "launch/local": "launch",
    "launch/nodes": "launch",
    "slurm/submit": "submit",
    "slurm/status": "status",
    "tune/sweep": "sweep",
}
DOORS = ("launch", "slurm", "tune")  # folders of scripts that only call a verb
OUTSIDE = ("tests", "benchmarks")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def layer(module: str) -> int:
    part = module.split(".")[0]
    for number, members in enumerate(LAYERS):
        if part in members:
            return number
    raise AssertionError(f"{module} belongs to no layer")


def files() -> list[Path]:
    return [p for p in sorted(PACKAGE.rglob("*.py")) if p.name != "__init__.py"]


def test_modules_import_only_from_their_own_or_lower_layers() -> None:
    wrong = []
    for path in files():
        module = module_name(path)
        for name in imports(path):
            inner = name.removeprefix("mtunet_dist.")
            known = (PACKAGE / inner.split(".")[0]).is_dir() or (PACKAGE / f"{inner.split('.')[0]}.py").is_file()
            if inner != name and known and layer(inner) > layer(module):
                wrong.append(f"{module} imports {inner}")
    assert not wrong


def test_heavy_libraries_stay_in_their_file() -> None:
    wrong = [
        f"{module_name(path)} imports {name}"
        for path in files()
        for name in imports(path)
        if name.split(".")[0] in ONLY_IN and not module_name(path).startswith(ONLY_IN[name.split(".")[0]])
    ]
    assert not wrong


def test_the_scripts_that_users_call_only_call_a_verb() -> None:
    scripts = [path for folder in DOORS for path in (REPOSITORY / folder).glob("*.py")]
    assert len(scripts) == 5
    for path in scripts:
        assert imports(path) == {"mtunet_dist.cli.run"}, path
        verb = VERBS[f"{path.parent.name}/{path.stem}"]
        assert path.read_text(encoding="utf-8").endswith(f'if __name__ == "__main__":\n    run("{verb}")\n'), path


def test_the_package_does_not_import_what_starts_it() -> None:
    wrong = [f"{module_name(p)} imports {n}" for p in files() for n in imports(p) if n.split(".")[0] in OUTSIDE]
    assert not wrong
