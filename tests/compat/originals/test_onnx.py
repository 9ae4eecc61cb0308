"""A network that TWINS has trained, as an ONNX file."""

import copy

import pytest
import torch

from tests.compat.originals.packages import original
from tests.nn.test_tools import NETWORKS, built
from twins_fast import revert_twin_bn

reference = original("onnx.reference")
original("onnxscript")


@pytest.mark.parametrize("name", NETWORKS)
def test_a_reverted_network(tmp_path, name):
    network = built(name)
    images = torch.rand(4, 3, 8, 8)
    network(images)  # moves the running statistics
    model = revert_twin_bn(copy.deepcopy(network)).eval()
    path = tmp_path / "network.onnx"
    torch.onnx.export(model, (images,), path)
    session = reference.ReferenceEvaluator(str(path))
    (found,) = session.run(None, {session.input_names[0]: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(images).detach(), rtol=1e-3, atol=1e-4)
