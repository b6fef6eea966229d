"""Load pipelines with the classes of the installed package, so that no code from their folder or repository runs."""

from importlib import import_module

from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin  # noqa: F401  looked up beside component classes

from .. import __all__ as installed

_PACKAGE = __name__.rsplit(".", 2)[0]


def __getattr__(name):
    # lets [this module, class name] in a model_index.json stand for any class of the package
    if name not in installed:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PACKAGE), name)


def with_installed_classes(pipeline_class: type[DiffusionPipeline]) -> type[DiffusionPipeline]:
    """Class decorator: `from_pretrained` uses this class, and the package's classes for the components.

    A folder or repository with code of its own then loads without `trust_remote_code`, and none of that code runs.
    Components of other classes are loaded as usual.
    """

    def _dict_from_json_file(cls, json_file):
        # `download` and `from_pretrained` read model_index.json with this; a list as class name would be code to run
        return {**super(pipeline_class, cls)._dict_from_json_file(json_file), "_class_name": cls.__name__}

    def extract_init_dict(cls, config_dict, **kwargs):
        for name, value in config_dict.items():
            if isinstance(value, list) and len(value) == 2 and value[0] != "diffusers" and value[1] in installed:
                config_dict = {**config_dict, name: [__name__, value[1]]}
        return super(pipeline_class, cls).extract_init_dict(config_dict, **kwargs)

    pipeline_class._dict_from_json_file = classmethod(_dict_from_json_file)
    pipeline_class.extract_init_dict = classmethod(extract_init_dict)
    return pipeline_class


def installed_class(path_or_repo: str) -> type[DiffusionPipeline]:
    """Return the package's class for a pipeline folder or repository, or `DiffusionPipeline` if it has none.

    Args:
        path_or_repo: pipeline folder or repository on the Hub.

    Raises:
        OSError: if there is no pipeline.
    """
    name = DiffusionPipeline.load_config(path_or_repo)["_class_name"]  # pyright: ignore[reportCallIssue, reportArgumentType]
    name = name if isinstance(name, str) else name[-1]
    return getattr(import_module(_PACKAGE), name) if name in installed else DiffusionPipeline
