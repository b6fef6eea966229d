"""Ways to draw pictures: one file a pipeline, complete in itself; what all have in common is added here."""

from ..hub.export import self_contained
from ..hub.installed import with_installed_classes
from .pipeline_class_conditional import ClassConditionalPipeline
from .pipeline_ddgan import DDGANPipeline
from .pipeline_guided import GuidedPipeline

for pipeline_class in (ClassConditionalPipeline, DDGANPipeline, GuidedPipeline):
    self_contained(with_installed_classes(pipeline_class))
