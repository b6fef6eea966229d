"""References in files: cached features, and statistics, the mean and covariance of features."""

import json
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError

from ..core.errors import InputError, naming_file
from ..core.files import fingerprint_parts, replace_file
from ..data.sources import read_arrays
from .extractors import FeatureExtractor
from .facts import ReferenceFacts, package_versions
from .features import load_features, read_protocol
from .metrics import Gaussian
from .references import Reference

_DIGEST = "statistics_digest"  # key of the protocol: hash of mu and sigma


def read_features(
    path: Path, extractor: FeatureExtractor, size: tuple[int, int], accelerator: Accelerator
) -> Reference:
    """Read cached features; they are in the main process only.

    Args:
        path: a .safetensors file.
        extractor: the network that computes the features of the samples.
        size: height and width of the samples.

    Raises:
        InputError: if the file is damaged, or its protocol is another.
    """
    with naming_file(path, SafetensorError):
        protocol, features = read_protocol(path), load_features(path)
    _check_protocol(path, protocol, extractor, size)
    return Reference(ReferenceFacts.from_dict(protocol), features if accelerator.is_main_process else None)


def save_statistics(path: Path, reference: Reference, extractor: FeatureExtractor, accelerator: Accelerator) -> None:
    """Write the statistics of a reference and their protocol to a file, atomically.

    The file has the arrays `mu` (D,) and `sigma` (D, D), float64, which other implementations of FID read, too, and
    `protocol`, a text in JSON: the images, their number and hash, the extractor and the hash of its weights, sizes and
    resizing, versions, and a hash of the two arrays.

    Args:
        path: an .npz file.
    """
    mean, covariance = reference.gaussian.mean, reference.gaussian.covariance
    protocol = {
        "device": accelerator.device.type,
        **extractor.facts.as_dict(),
        **reference.facts.as_dict(),  # may be those of a file
        "versions": package_versions(),
        _DIGEST: _digest(mean, covariance),
    }
    arrays = {"mu": mean, "sigma": covariance, "protocol": np.array(json.dumps(protocol))}
    replace_file(path, lambda temporary: np.savez(temporary, **arrays))  # pyright: ignore[reportArgumentType]


def holds_statistics(path: Path) -> bool:
    """Return whether an .npz file contains `mu` and `sigma` instead of images."""
    with naming_file(path), ZipFile(path) as file:
        names = {Path(name).stem for name in file.namelist()}
    return "arr_0" not in names and {"mu", "sigma"} <= names


def read_statistics(path: Path, name: str, extractor: FeatureExtractor, size: tuple[int, int]) -> Reference:
    """Read the statistics that `save_statistics` or another program has written.

    Args:
        path: an .npz file with `mu` (D,) and `sigma` (D, D).
        name: name of the reference, for statistics without a protocol.
        extractor: the network that computes the features of the samples.
        size: height and width of the samples.

    Raises:
        InputError: if the file is damaged, the shapes do not fit the features of the extractor, or the protocol is
            another.
    """
    arrays = read_arrays(path)
    mean, covariance = (arrays[key].astype(float) for key in ("mu", "sigma"))
    protocol: dict[str, Any] | None = None
    if "protocol" in arrays:
        with naming_file(path, TypeError):
            protocol = dict(json.loads(str(arrays["protocol"])))
        _check_protocol(path, protocol, extractor, size)
        if protocol.get(_DIGEST) != _digest(arrays["mu"], arrays["sigma"]):
            raise InputError(f"{path} is damaged or was changed: mu and sigma are not those of its protocol.")
    dimensions = extractor(torch.zeros(1, extractor.channels, *size, dtype=torch.uint8))["features"].shape[1]
    if mean.shape != (dimensions,) or covariance.shape != (dimensions, dimensions):
        raise InputError(
            f"{path} has mu of the shape {mean.shape} and sigma of {covariance.shape}, but the features of "
            f"{extractor.name} have {dimensions} dimensions. Choose the extractor that computed them."
        )
    symmetric = np.allclose(covariance, covariance.T, rtol=1e-3, atol=1e-3 * np.abs(covariance).max())
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all() and symmetric) or (
        np.linalg.eigvalsh(covariance).min() < -1e-3 * np.abs(covariance).max()
    ):
        raise InputError(
            f"{path}: sigma is not a covariance matrix (symmetric, without negative variances), or a value is not "
            "finite. Compute mu and sigma again."
        )
    kind = f"mu and sigma, {'of unknown protocol' if protocol is None else 'with their protocol'}"
    facts = ReferenceFacts.from_dict({"name": name, **(protocol or {}), "statistics": kind})
    return Reference(facts, None, Gaussian(mean, covariance))


def _check_protocol(path: Path, protocol: dict[str, Any], extractor: FeatureExtractor, size: tuple[int, int]) -> None:
    """Check that the features in a file were computed like those of the samples.

    Raises:
        InputError: if the extractor, its weights, the resizing or the size of the images differ.
    """
    facts, samples_size = extractor.facts, f"{size[1]}x{size[0]}"
    if protocol.get("extractor_digest") != facts.digest:
        raise InputError(
            f"The features in {path} are those of {protocol.get('extractor', 'an unknown network')} with the weights "
            f"{protocol.get('extractor_digest', 'unknown')}, not of {facts.name} with the weights {facts.digest}. "
            "Pass the network that computed them with --feature_extractor and --extractor_weights, or measure the "
            "reference images themselves."
        )
    if protocol.get("resize", facts.resize) != facts.resize:
        raise InputError(
            f"The features in {path} are those of images that were resized {protocol['resize']}, but the samples are "
            f"resized {facts.resize}. Measure the reference images themselves."
        )
    if protocol.get("measured_at", samples_size) != samples_size:
        raise InputError(
            f"The features in {path} are those of images at {protocol['measured_at']}, but the samples are "
            f"{samples_size}. Measure samples of that size, or the reference images themselves."
        )


def _digest(mean: np.ndarray, covariance: np.ndarray) -> str:
    return fingerprint_parts(np.ascontiguousarray(array).data for array in (mean, covariance))
