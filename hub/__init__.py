"""Pipeline folders as things to publish: complete in themselves, with a model card, uploaded."""
