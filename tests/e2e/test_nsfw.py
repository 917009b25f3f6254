"""A thin ResNet-50 from its ONNX file, on a cluster of processes: photographs nobody sees, the answers of plaintext."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from assets import open_nsfw
from demo_minilm import LIMITS, TIMEOUT
from sklearn.datasets import load_sample_images

from mpcinfer import Client, ModelOwner
from mpcinfer.models.load import load
from tests.e2e.clusters import local_cluster

pytestmark = [pytest.mark.slow, pytest.mark.net, pytest.mark.timeout(3600)]


def preprocessing() -> Any:
    """The module that the model's package prepares pictures with."""
    spec = importlib.util.spec_from_file_location("preprocessing", open_nsfw().with_name("preprocessing.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def photographs() -> torch.Tensor:
    """scikit-learn's two, and a part of one of them, mirrored: prepared, [3, 224, 224, 3]."""
    image = pytest.importorskip("PIL.Image")
    china, flower = load_sample_images().images
    pictures = [image.fromarray(x) for x in (china, flower, flower[100:400, 300:100:-1].copy())]
    prepare = preprocessing().preprocess
    return torch.stack([torch.from_numpy(prepare(picture).copy()) for picture in pictures])


def test_photographs_are_classified_as_in_plaintext(tmp_path: Path) -> None:
    model, images = load(open_nsfw()).module, photographs()
    with torch.no_grad():
        plain = model(images)
    with local_cluster(tmp_path / "cluster", 2, limits=LIMITS) as cluster:
        with ModelOwner.connect(cluster.cluster_path) as owner:
            owner.deploy(model, images[:1], name="nsfw")
        with Client.connect(cluster.cluster_path) as client:
            private = torch.cat([client.infer("nsfw", image[None], timeout=TIMEOUT) for image in images])
    assert torch.equal(private.argmax(1), plain.argmax(1))
    assert (private - plain).abs().max() <= 0.01
