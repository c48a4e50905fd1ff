"""The complete job on the model that comes with krony, offline."""
