"""Optional dependencies, installed with `pip install -e '.[extra]'`."""


def missing_extra(package: str, extra: str) -> str:
    """Return the part of an error message that says `package` is missing and how to install it.

    Args:
        package: name of the package on PyPI.
        extra: the extra of diffusers-ddgan that includes it.
    """
    return f"{package} is not installed. Run pip install -e '.[{extra}]' in your clone of diffusers-ddgan"
