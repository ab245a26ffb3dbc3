import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.bundle import ConfigParser
from torch import nn

from medseg.errors import ConfigError
from medseg.networks import LearnableWindow, UNet
from medseg.transforms import HounsfieldWindow

#: Below, inside and above the window (70, 200), none on an edge.
HU = torch.tensor([-1000.0, -31.0, -29.0, 50.0, 169.0, 171.0, 2000.0], dtype=torch.float64)
BELOW, INSIDE, ABOVE = HU < -30, (HU > -30) & (HU < 170), HU > 170


def voxels(values: torch.Tensor) -> torch.Tensor:
    return values.reshape(1, 1, -1)


def gradients(window: LearnableWindow, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every voxel's output, by center and by width."""
    found = []
    for number in range(values.numel()):
        window.zero_grad()
        window(voxels(values))[0, 0, number].backward()
        found.append((window.raw_center.grad.item(), window.raw_width.grad.item()))
    by_center, by_width = np.array(found).T
    return torch.from_numpy(by_center), torch.from_numpy(by_width)


def test_gradients_are_those_of_equations_6_4_and_6_5():
    window = LearnableWindow((70, 200)).double()
    by_center, by_width = gradients(window, HU)
    assert torch.equal(by_center, (~INSIDE).double())
    assert torch.equal(by_width, 0.5 * ABOVE.double() - 0.5 * BELOW.double())
    x = voxels(HU).requires_grad_()
    window(x).sum().backward()
    assert torch.equal(x.grad.flatten(), INSIDE.double())


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("unit", [1.0, 40.0])
def test_gradients_by_finite_differences(scale, unit):
    window = LearnableWindow([(70, 200), (10, 90)], scale=scale, unit=unit).double()
    start = (window.raw_center.detach().clone().requires_grad_(), window.raw_width.detach().clone().requires_grad_())

    def output(center: torch.Tensor, width: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(window, {"raw_center": center, "raw_width": width}, (x,))

    assert torch.autograd.gradcheck(output, (*start, voxels(HU).requires_grad_()))


def test_gradients_of_the_scaled_form():
    by_center, by_width = gradients(LearnableWindow((70, 200), scale=True).double(), HU)
    torch.testing.assert_close(by_center, INSIDE.double() / -200)
    torch.testing.assert_close(by_width, INSIDE * (70 - HU) / 200**2)


@given(
    st.lists(st.tuples(st.floats(-1000, 1000), st.floats(1, 2000)), min_size=1, max_size=3),
    st.lists(st.floats(-1024, 3071), min_size=1, max_size=20),
    st.booleans(),
)
def test_the_window_is_that_of_the_transform(windows, values, scale):
    ct = torch.tensor(values)[None]
    found = LearnableWindow(windows, scale=scale)(ct[None])[0].detach()
    torch.testing.assert_close(found, HounsfieldWindow(windows, scale=scale)(ct), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("spatial", [(5, 4), (3, 4, 2)])
def test_windows_stand_in_the_place_of_the_ct_and_the_rest_passes_unchanged(spatial):
    x = torch.randn(2, 3, *spatial) * 100
    y = LearnableWindow([(0, 50), (70, 200)], channel=1)(x)
    assert y.shape == (2, 4, *spatial)
    assert torch.equal(y[:, 0], x[:, 0])
    assert torch.equal(y[:, 3], x[:, 2])
    torch.testing.assert_close(y[:, 1], x[:, 1].clamp(-25, 25), atol=1e-3, rtol=0)
    torch.testing.assert_close(y[:, 2], x[:, 1].clamp(-30, 170), atol=1e-3, rtol=0)


def test_the_width_stays_positive_and_comes_back():
    window = LearnableWindow((0, 10), min_width=2)
    with torch.no_grad():
        window.raw_width.fill_(-5)
    assert window.windows == [{"center": 0.0, "width": 2.0}]
    x = torch.tensor([[[-9.0, 0.5, 9.0]]])
    assert window(x).flatten().tolist() == [-1, 0.5, 1]
    optimizer = torch.optim.SGD(window.parameters(), 1.0)
    for _ in range(20):  # the voxel above should be brighter, the one below darker: a wider window
        optimizer.zero_grad()
        out = window(x).flatten()
        (out[0] - out[2]).backward()
        optimizer.step()
    assert window.width.item() == pytest.approx(15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("raw_width", [-3.0, -1001.0, -60000.0])
def test_no_step_is_so_large_that_the_width_becomes_zero(dtype, raw_width):
    window = LearnableWindow((70, 200), scale=True, unit=1.0).to(dtype)
    with torch.no_grad():
        window.raw_width.fill_(raw_width)
    assert window.width.item() == 1
    x = torch.tensor([[[-30000.0, 70.0, 30000.0]]], dtype=dtype)
    out = window(x)
    assert out.flatten().tolist() == [0, 0.5, 1]
    out.sum().backward()
    assert window.raw_width.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_lies_in_the_window_passes_exactly_and_the_rest_is_its_edge(dtype):
    x = torch.tensor([[[-30000.0, -601.0, 70.0, 141.0, 30000.0]]]).to(dtype)
    low, high = (torch.tensor(edge, dtype=dtype).item() for edge in (-1344.0, 144.0))
    assert LearnableWindow((-600, 1488)).to(dtype)(x).flatten().tolist() == [low, *x.flatten().tolist()[1:4], high]


def test_unit_sets_what_a_step_of_adam_moves():
    moved = []
    for unit in (1.0, 1000.0):
        window = LearnableWindow((70, 200), unit=unit)
        window(torch.full((1, 1, 3), 900.0)).sum().backward()
        torch.optim.Adam(window.parameters(), 0.002).step()
        moved.append([window.center.item() - 70, window.width.item() - 200])
    assert moved[0] == pytest.approx([-0.002] * 2, rel=0.01)
    assert moved[1] == pytest.approx([-2] * 2, rel=0.01)


def test_what_was_learned_can_be_given_to_the_transform():
    window = LearnableWindow([{"center": 70, "width": 200}, (60, 100)], unit=1000)
    assert np.allclose(HounsfieldWindow(window.windows).windows, [(70, 200), (60, 100)])


def test_it_learns_which_window_the_truth_was_made_with():
    x = torch.linspace(-500, 500, 400).reshape(1, 1, 20, 20)
    truth = LearnableWindow((70, 200))(x).detach()
    window = LearnableWindow((-60, 420), unit=1000)
    optimizer = torch.optim.Adam(window.parameters(), 0.01)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.mse_loss(window(x), truth).backward()
        optimizer.step()
    assert window.center.item() == pytest.approx(70, abs=2)
    assert window.width.item() == pytest.approx(200, abs=4)


def test_a_bundle_configuration_puts_it_in_front_of_a_network():
    config = {
        "window": {"_target_": "medseg.networks.LearnableWindow", "windows": [{"center": 300, "width": 100}]},
        "network": "$torch.nn.Sequential(@window, medseg.networks.UNet(2, 2, 1, [4, 8]))",
        "imports": ["$import torch", "$import medseg"],
    }
    parser = ConfigParser(config)
    parser.get_parsed_content("imports")
    network = parser.get_parsed_content("network")
    assert isinstance(network[1], UNet)
    assert network(torch.zeros(2, 2, 9, 8)).shape == (2, 1, 9, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"windows": []}, "expected at least one"),
        ({"windows": (70, 0)}, "width of at least 1.0 HU"),
        ({"windows": [(70, 200), (70, -1)]}, "width of at least 1.0 HU"),
        ({"windows": (70, float("nan"))}, "width of at least 1.0 HU"),
        ({"windows": (float("inf"), 100)}, "finite"),
        ({"windows": {"center": 70}}, "expected center and width"),
        ({"windows": [(1, 2, 3)]}, "expected center and width"),
        ({"windows": 70}, "expected center and width"),
        ({"windows": (70, 200), "unit": 0}, "unit 0"),
        ({"windows": (70, 200), "unit": float("inf")}, "unit inf"),
        ({"windows": (70, 200), "min_width": 0}, "min_width 0"),
    ],
)
def test_impossible_arguments_are_named(arguments, message):
    with pytest.raises(ConfigError, match=message) as error:
        LearnableWindow(**arguments)
    assert "\n" not in str(error.value)


def test_an_image_without_the_channel_is_named():
    with pytest.raises(ConfigError, match=r"shape \(1, 1, 4, 4\) has no channel 1"):
        LearnableWindow((70, 200), channel=1)(torch.zeros(1, 1, 4, 4))
    with pytest.raises(ConfigError, match="no channel 0"):
        LearnableWindow((70, 200))(torch.zeros(4, 4))
