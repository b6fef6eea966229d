"""Publishing pipelines: self-contained folders, model cards and uploads to the Hugging Face Hub."""
