"""Optional dependencies, which `pip install -e '.[extra]'` adds."""


def missing_extra(package: str, extra: str) -> str:
    """Return a clause for an error message: that `package` is not installed, and how to install it.

    Args:
        package: name of the package on PyPI.
        extra: the extra of diffusers-ddgan that contains it.
    """
    return f"{package} is not installed. Run pip install -e '.[{extra}]' in your clone of diffusers-ddgan"
