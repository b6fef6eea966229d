"""Pipeline folders as things to publish: model card and upload."""
