"""Pipelines, one self-contained file each. Saving, loading and pushing are extended here, the same for all."""

from ..hub.cards import with_model_card
from ..hub.export import self_contained
from ..hub.installed import with_installed_classes
from .pipeline_class_conditional import Autoguidance, ClassConditionalPipeline
from .pipeline_ddgan import DDGANPipeline
from .pipeline_guided import GuidedPipeline

GuidedPipeline._autoguidance = Autoguidance  # the files of pipelines do not import each other
for pipeline_class in (ClassConditionalPipeline, DDGANPipeline, GuidedPipeline):
    with_model_card(self_contained(with_installed_classes(pipeline_class)))
