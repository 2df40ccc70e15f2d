"""Networks: tensors in, tensors out. Nothing here knows a file, a config or a dataset."""
