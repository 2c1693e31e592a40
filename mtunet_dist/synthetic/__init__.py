"""Street scenes from numpy alone: pictures, labels and metric depth, written in the tree layout of Cityscapes."""
