"""HOG against its definition and in little memory; the tokenizer from every file, without running
any of their code."""

import os

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling_targets import HOG, DalleEncoder, VisualTokenizer, dalle_pixels, load_tokenizer
from scripts.benchmarks.benchmark import LivingBytes
from scripts.benchmarks.published import one_hot_histograms

MEAN, STD = (
    torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count: int = 2, height: int = 32, width: int = 32) -> Tensor:
    return torch.randint(
        0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator()
    )


# --------------------------------------------------------------------------------------------------
# HOG


@pytest.mark.parametrize(("nbins", "pool", "window"), [(9, 8, 16), (6, 4, 0), (9, 2, 8)])
def test_hog_is_what_its_definition_says(nbins, pool, window):
    """On images that are not square; in float64, where nothing but the published order of
    operations is rounded."""
    images = pictures(3, 32, 48)
    hog = HOG((4, 6), (8, 8), nbins, pool, window)
    expected = one_hot_histograms(images.double(), nbins, pool, window)
    torch.testing.assert_close(hog.histograms(images).double(), expected, rtol=1e-5, atol=1e-6)
    side, target = 8 // pool, hog(images)
    assert target.shape == (3, 24, hog.width) and hog.width == 3 * nbins * side**2
    for cell in (0, 7, 23):  # the layout of a patch: color, bin, cell row, cell column
        row, column = divmod(cell, 6)
        inside = expected[
            :, :, :, row * side : (row + 1) * side, column * side : (column + 1) * side
        ]
        torch.testing.assert_close(
            target[:, cell].double(), inside.flatten(1), rtol=1e-5, atol=1e-6
        )


def test_hog_of_raw_and_of_normalized_images():
    """The same, but where the horizontal gradient is 0: there rounding decides between the first
    and the last bin."""
    images = pictures(2, 64, 64)
    hog = HOG((4, 4), (16, 16))
    raw, normalized = hog.histograms(images), hog.histograms((images / 255 - MEAN) / STD)
    same = (raw - normalized).abs().amax(2) < 1e-3
    padded = F.pad(images.float(), (1, 1, 1, 1), mode="reflect")
    across = padded[..., :-2] - padded[..., 2:]
    vertical = across[..., :-2, :] + 2 * across[..., 1:-1, :] + across[..., 2:, :] == 0
    assert not (~same & (F.max_pool2d(vertical.float(), 8) == 0)).any()
    assert same.float().mean() > 0.7


def test_hog_of_flat_images_is_zero_and_autocast_changes_nothing():
    hog = HOG((4, 4), (16, 16))
    assert not hog(torch.full((2, 3, 64, 64), 0.3)).any()
    images = torch.randn(2, 3, 64, 64, generator=generator())
    expected = hog(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(hog(images), expected)


def test_hog_needs_a_tenth_of_the_memory():
    images = torch.randn(64, 3, 64, 64, generator=generator())
    hog = HOG((4, 4), (16, 16))
    with LivingBytes() as naive:
        expected = one_hot_histograms(images, 9, 8, 16)
    with LivingBytes() as ours:
        found = hog.histograms(images)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert ours.peak < naive.peak / 10
    assert ours.peak < 8 * found.numel() * found.element_size()


def test_what_hog_refuses():
    with pytest.raises(ValueError, match="hog_pool=5 must divide patches of 16 x 16"):
        HOG((4, 4), (16, 16), pool=5)
    with pytest.raises(ValueError, match="hog_window=24 does not divide"):
        HOG((4, 4), (16, 16), window=24)


# --------------------------------------------------------------------------------------------------
# The tokenizer


def encoder(seed: int = 0, **sizes) -> DalleEncoder:
    torch.manual_seed(seed)
    made = DalleEncoder(**{"n_hid": 8, "blocks_per_group": 1, "vocab_size": 20, **sizes})
    for parameter in made.parameters():
        parameter.data.normal_(0, 0.3)
    made.blocks["output"]["conv"].bias.data.zero_()  # or most places would have the same token
    return made


def blocks() -> Tensor:
    """Eight pixels of one color each, which give different tokens."""
    colors = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8, generator=generator())
    return colors.repeat_interleave(8, 2).repeat_interleave(8, 3)


def published(made: DalleEncoder) -> dict[str, Tensor]:
    names = {".weight": ".w", ".bias": ".b"}
    return {
        name.replace(end, short): value.contiguous()
        for name, value in made.state_dict().items()
        for end, short in names.items()
        if name.endswith(end)
    }


class Conv(nn.Module):
    """A module with OpenAI's names and with attributes that a pickle of it carries along."""

    def __init__(self, weight: Tensor, bias: Tensor):
        super().__init__()
        self.w, self.b = nn.Parameter(weight), nn.Parameter(bias)
        self.device, self.extra = torch.device("cpu"), {1, 2}


def as_modules(state: dict[str, Tensor]) -> nn.Module:
    """A tree of modules whose state dict this is."""
    if set(state) == {"w", "b"}:
        return Conv(state["w"], state["b"])
    root = nn.Sequential()
    for name in dict.fromkeys(name.partition(".")[0] for name in state):
        below = {k.partition(".")[2]: v for k, v in state.items() if k.partition(".")[0] == name}
        root.add_module(name, as_modules(below))
    return root


class Trap:
    """Its pickle runs a command."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_every_file_gives_the_same_tokens(tmp_path):
    made = encoder()
    expected = VisualTokenizer(encoder())(blocks())
    state = published(made)
    torch.save(as_modules(state), tmp_path / "encoder.pkl")
    torch.save(as_modules(state), tmp_path / "legacy.pkl", _use_new_zipfile_serialization=False)
    torch.save(state, tmp_path / "dalle_encoder.pth")
    torch.save({"state_dict": state, "meta": {"epoch": 1}}, tmp_path / "wrapped.pth")
    torch.save(
        {"state_dict": {f"target_generator.{k}": v for k, v in state.items()}},
        tmp_path / "checkpoint.pth",
    )
    safetensors.torch.save_file(state, tmp_path / "encoder.safetensors")
    for path in sorted(tmp_path.iterdir()):
        tokenizer = load_tokenizer(str(path))
        assert tokenizer.vocab_size == 20 and tokenizer.encoder.stride == 8
        assert torch.equal(tokenizer(blocks()), expected), path.name


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickled_module_is_read_and_not_executed(tmp_path, zipped):
    modules = as_modules(published(encoder()))
    modules.blocks.trap = Trap(f"touch {tmp_path / 'sprung'}")
    torch.save(modules, tmp_path / "encoder.pkl", _use_new_zipfile_serialization=zipped)
    tokenizer = load_tokenizer(str(tmp_path / "encoder.pkl"))
    assert torch.equal(tokenizer(blocks()), VisualTokenizer(encoder())(blocks()))
    assert not (tmp_path / "sprung").exists()
    torch.load(tmp_path / "encoder.pkl", weights_only=False)
    assert (tmp_path / "sprung").exists(), "the trap is none"


def test_only_the_asked_places_are_computed():
    tokenizer = VisualTokenizer(encoder())
    tokenizer.rows = 5
    whole = tokenizer(blocks())
    assert whole.shape == (2, 16) and len(whole.unique()) > 2
    positions = torch.tensor([[3, 0, 15], [7, 7, 1]])
    logits: list[int] = []
    handle = tokenizer.encoder.logits
    tokenizer.encoder.logits = lambda few: logits.append(len(few)) or handle(few)
    assert torch.equal(tokenizer(blocks(), positions), whole.gather(1, positions))
    assert logits == [5, 1], "six places, five at a time"


def test_mapped_and_raw_images_and_half_precision():
    tokenizer = VisualTokenizer(encoder())
    mapped = dalle_pixels(blocks())
    torch.testing.assert_close(mapped, 0.8 * blocks() / 255 + 0.1)
    assert torch.equal(tokenizer(mapped), tokenizer(blocks()))
    half = VisualTokenizer(encoder(), "bf16")
    assert {p.dtype for p in half.encoder.parameters()} == {torch.bfloat16}
    assert (half(blocks()) == tokenizer(blocks())).float().mean() > 0.7
    assert not any(p.requires_grad for p in tokenizer.encoder.parameters())


def test_what_is_refused(tmp_path):
    path = tmp_path / "encoder.pth"
    with pytest.raises(ValueError, match="does not exist"):
        load_tokenizer(str(path))
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="damaged"):
        load_tokenizer(str(path))
    torch.save({"conv.w": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="holds no encoder of DALL-E"):
        load_tokenizer(str(path))
    torch.save({k: v for k, v in published(encoder()).items() if "group_2" not in k}, path)
    with pytest.raises(ValueError, match="is not whole"):
        load_tokenizer(str(path))
    with pytest.raises(ValueError, match="target_precision=int8 is unknown"):
        VisualTokenizer(encoder(), "int8")
