"""Networks: one file a model, complete in itself."""
