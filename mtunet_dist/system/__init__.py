"""The operating system's part: files, locks, signals, processes, addresses, terminals. It knows no training."""
