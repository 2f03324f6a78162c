"""Networks have the published sizes; the classifier trains with the published recipe."""

import lightning as L
import pytest
import torch
from torch import nn

from dynasty_lightning import convert
from dynasty_lightning.data import TensorDataModule, load_data
from dynasty_lightning.models import MODELS, CifarResNet, Classifier, ResNet18, VisionTransformer, build_model


def parameters(network):
    return sum(p.numel() for p in network.parameters())


def resnet_parameters(depth, in_channels, classes, width=16):
    """Counted from the description: 3x3 convolutions with BatchNorm, 1x1 shortcuts where a stage begins, one linear head."""

    def conv(inputs, outputs, size):
        return inputs * outputs * size * size + 2 * outputs

    total, inputs = conv(in_channels, width, 3), width
    for outputs in (width, 2 * width, 4 * width):
        for _ in range((depth - 2) // 6):
            total += conv(inputs, outputs, 3) + conv(outputs, outputs, 3)
            total += conv(inputs, outputs, 1) if inputs != outputs else 0
            inputs = outputs
    return total + inputs * classes + classes


@pytest.mark.parametrize(
    ("depth", "in_channels", "classes", "count"), [(8, 3, 10, 78042), (20, 3, 10, 272474), (20, 3, 100, 278324), (8, 1, 10, 77754)]
)
def test_resnet_parameters(depth, in_channels, classes, count):
    network = CifarResNet(depth, in_channels=in_channels, classes=classes)
    assert parameters(network) == count == resnet_parameters(depth, in_channels, classes)
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convolutions) + 1 == depth


def test_mlp_parameters():
    network = build_model("mlp", in_channels=1, image_size=8, classes=10)
    assert parameters(network) == 64 * 256 + 256 + 256 * 256 + 256 + 256 * 10 + 10


def test_mlp1024_has_three_hidden_layers():
    network = build_model("mlp1024", in_channels=3, image_size=32, classes=10)
    assert [(m.in_features, m.out_features) for m in network if isinstance(m, nn.Linear)] == [
        (3072, 1024), (1024, 1024), (1024, 1024), (1024, 10),
    ]  # fmt: skip
    assert parameters(network) == 3072 * 1024 + 1024 + 2 * (1024 * 1024 + 1024) + 10240 + 10


@pytest.mark.parametrize(("classes", "count"), [(10, 11_173_962), (100, 11_220_132)])
def test_resnet18_parameters(classes, count):
    network = ResNet18(classes=classes)
    assert parameters(network) == count
    assert len([m for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]) + 1 == 18


def test_resnet18_halves_the_image_three_times():
    network = ResNet18(width=4)
    assert network.blocks(network.stem(torch.randn(2, 3, 32, 32))).shape == (2, 32, 4, 4)


def test_vit_parameters():
    # DeiT-Tiny (Touvron et al., 2021) has 5,717,416, of which a class token and its position take 192 each.
    assert parameters(VisionTransformer(image_size=224, patch_size=16, classes=1000, depth=12)) == 5_717_416 - 2 * 192
    block = 4 * (192 * 192 + 192) + 2 * 192 * 768 + 768 + 192 + 4 * 192
    patches, head = 3 * 16 * 192 + 192 + 64 * 192, 2 * 192 + 192 * 10 + 10
    assert parameters(VisionTransformer()) == patches + 6 * block + head == 2_693_194


def test_vit_attention_equals_torch():
    ours = VisionTransformer(width=24, depth=1).blocks[0].attention
    theirs = nn.MultiheadAttention(24, 3, batch_first=True)
    theirs.load_state_dict(
        {
            "in_proj_weight": ours.qkv.weight, "in_proj_bias": ours.qkv.bias,
            "out_proj.weight": ours.projection.weight, "out_proj.bias": ours.projection.bias,
        }
    )  # fmt: skip
    x = torch.randn(2, 5, 24)
    torch.testing.assert_close(ours(x), theirs(x, x, x, need_weights=False)[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{"image_size": 30}, {"width": 190}])
def test_vit_checks_its_sizes(options):
    with pytest.raises(ValueError, match="must be a multiple of"):
        VisionTransformer(**options)


@pytest.mark.parametrize(("model", "layers"), [("resnet18", 21), ("vit", 26), ("mlp1024", 4)])
def test_every_gemm_with_a_weight_converts(model, layers):
    network = build_model(model, in_channels=3, image_size=32, classes=10)
    report = convert(network)
    assert (len(report.converted), report.skipped) == (layers, ())
    assert sum(isinstance(m, nn.Linear | nn.Conv2d) for m in network.modules()) == layers


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("in_channels", "size", "classes"), [(1, 8, 10), (1, 28, 10), (3, 32, 100)])
def test_models_fit_the_data(model, in_channels, size, classes):
    network = build_model(model, in_channels=in_channels, image_size=size, classes=classes)
    images = torch.randn(2, in_channels, size, size)
    logits = network(images)
    assert logits.shape == (2, classes)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize(("stem_stride", "size"), [(1, 8), (2, 4)])
def test_stem_stride(stem_stride, size):
    network = CifarResNet(8, in_channels=1, stem_stride=stem_stride)
    assert network.blocks(torch.relu(network.bn(network.stem(torch.randn(2, 1, 32, 32))))).shape == (2, 64, size, size)


def test_images_of_28_pixels_go_through_a_stem_of_stride_2():
    assert build_model("resnet8", in_channels=1, image_size=28, classes=10).stem.stride == (2, 2)
    assert build_model("resnet8", in_channels=3, image_size=32, classes=10).stem.stride == (1, 1)


@pytest.mark.parametrize("depth", [2, 9, 21])
def test_depth_must_be_6n_plus_2(depth):
    with pytest.raises(ValueError, match=rf"depth must be 6n \+ 2 .*not {depth}"):
        CifarResNet(depth)


def test_unknown_model_lists_the_known():
    with pytest.raises(ValueError, match=r"'vgg'.*resnet8, resnet20, resnet38, .*vgg-small"):
        build_model("vgg", in_channels=3, image_size=32, classes=10)


class Rates(L.Callback):
    def __init__(self):
        self.rates = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def fit(epochs=2, batch_size=128, **options):
    data = TensorDataModule(load_data("digits"), batch_size=batch_size, train_images=256, validation_images=100)
    module = Classifier(build_model("mlp", in_channels=1, image_size=8, classes=10), classes=10, **options)
    rates = Rates()
    trainer = L.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[rates],
    )  # fmt: skip
    trainer.fit(module, data)
    return trainer, module, data, rates.rates


def test_recipe():
    trainer, _, _, rates = fit()
    optimizer = trainer.optimizers[0]
    assert isinstance(optimizer, torch.optim.SGD)
    group = optimizer.param_groups[0]
    assert (group["initial_lr"], group["momentum"], group["nesterov"], group["weight_decay"]) == (0.1, 0.9, True, 1e-4)
    # Cosine over the whole run, step by step: 0.1 (1 + cos(pi t / 4)) / 2.
    assert rates == pytest.approx([0.1, 0.0853553, 0.05, 0.0146447], rel=1e-5)
    assert group["lr"] == pytest.approx(0.0, abs=1e-9)


def test_warmup_rises_to_the_learning_rate():
    *_, rates = fit(epochs=4, warmup_fraction=0.5, learning_rate=0.08)
    assert rates == pytest.approx([0.02, 0.035, 0.05, 0.065, 0.08, 0.0682843, 0.04, 0.0117157], rel=1e-5)


def test_it_learns_and_logs():
    trainer, module, data, _ = fit(epochs=6, batch_size=32)
    assert {"train_loss", "val_loss", "val_accuracy"} <= trainer.callback_metrics.keys()
    (tested,) = trainer.test(module, data, verbose=False)
    assert tested["test_accuracy"] > 0.8
    with torch.no_grad():
        logits = module.eval()(data.test_images)
    assert tested["test_accuracy"] == pytest.approx(float((logits.argmax(1) == data.test_labels).float().mean()))
    assert tested["test_loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, data.test_labels)), rel=1e-5)
