"""From a prepared dataset to batches on the device: the file format, the order of samples, augmentation, loaders."""
