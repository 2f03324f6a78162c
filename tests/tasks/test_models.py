"""Networks have the published sizes; the classifier trains with the published recipe."""

from itertools import pairwise

import lightning as L
import pytest
import torch
from torch import nn

from dynasty_lightning import convert
from dynasty_lightning.tasks.data import TensorDataModule, load_data
from dynasty_lightning.tasks.models import (
    MODELS,
    CharTransformer,
    CifarResNet,
    Classifier,
    MobileNetV2,
    ResNet18,
    VggSmall,
    VisionTransformer,
    build_model,
)


def parameters(network):
    return sum(p.numel() for p in network.parameters())


def conv(inputs, outputs, size):
    """Parameters of a convolution without bias and the BatchNorm behind it."""
    return inputs * outputs * size * size + 2 * outputs


def resnet_parameters(depth, in_channels, classes, width=16):
    """Counted from the description: 3x3 convolutions with BatchNorm, 1x1 shortcuts where a stage
    begins, one linear head.
    """
    total, inputs = conv(in_channels, width, 3), width
    for outputs in (width, 2 * width, 4 * width):
        for _ in range((depth - 2) // 6):
            total += conv(inputs, outputs, 3) + conv(outputs, outputs, 3)
            total += conv(inputs, outputs, 1) if inputs != outputs else 0
            inputs = outputs
    return total + inputs * classes + classes


# Published with 1x1 shortcuts: ResNet-20, 56 and 110 for CIFAR-10 in the table of
# github.com/osmr/imgclsmob (272,474, 855,770 and 1,730,714). The others follow from the formula; 38
# and 74 are the depths of FracTrain and CPT, whose shortcuts are 1x1 too
# (github.com/GATECH-EIC/FracTrain, fractrain_cifar/models.py; it also allocates BatchNorms that no
# forward pass uses).
@pytest.mark.parametrize(
    ("depth", "in_channels", "classes", "count"),
    [
        (8, 3, 10, 78_042),
        (20, 3, 10, 272_474),
        (38, 3, 10, 564_122),
        (56, 3, 10, 855_770),
        (74, 3, 10, 1_147_418),
        (110, 3, 10, 1_730_714),
        (20, 3, 100, 278_324),
        (38, 3, 100, 569_972),
        (74, 3, 100, 1_153_268),
        (8, 1, 10, 77_754),
    ],
)
def test_resnet_parameters(depth, in_channels, classes, count):
    network = CifarResNet(depth, in_channels=in_channels, classes=classes)
    assert parameters(network) == count == resnet_parameters(depth, in_channels, classes)
    convolutions = [
        m for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)
    ]
    assert len(convolutions) + 1 == depth


def test_resnet8x4():
    """Channels 32, 64, 128, 256 as in github.com/HobbitLong/RepDistiller, models/resnet.py; the
    count follows from them.
    """
    pairs = ((32, 64), (64, 128), (128, 256))
    blocks = sum(conv(i, o, 3) + conv(o, o, 3) + conv(i, o, 1) for i, o in pairs)
    count = parameters(build_model("resnet8x4", in_channels=3, image_size=32, classes=100))
    assert count == conv(3, 32, 3) + blocks + 256 * 100 + 100 == 1_233_540


@pytest.mark.parametrize(
    ("depth", "millions"), [(20, "0.27"), (32, "0.46"), (44, "0.66"), (56, "0.85"), (110, "1.7")]
)
def test_resnet_without_its_shortcuts_has_the_size_of_the_paper(depth, millions):
    """He et al. (2016), table 6, counts networks with option A: a shortcut pads channels with zeros
    and has no parameters.
    """
    shortcuts = sum(outputs // 2 * outputs + 2 * outputs for outputs in (32, 64))
    count = parameters(CifarResNet(depth)) - shortcuts
    assert f"{count / 1e6:.{len(millions) - 2}f}" == millions
    assert depth != 20 or count == 269_722


def mobilenet_parameters(classes):
    """Counted from table 2 of Sandler et al. (2018): every convolution without bias, with a
    BatchNorm.
    """
    total, inputs = 3 * 32 * 9 + 2 * 32, 32
    for t, c, n, _ in (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ):
        for _ in range(n):
            hidden = t * inputs
            expansion = inputs * hidden + 2 * hidden if t > 1 else 0
            total += expansion + 9 * hidden + 2 * hidden + hidden * c + 2 * c
            inputs = c
    return total + 320 * 1280 + 2 * 1280 + 1280 * classes + classes


# Published: 3,504,872 for ImageNet (torchvision, mobilenet_v2, num_params), to which strides make
# no difference.
@pytest.mark.parametrize(
    ("classes", "count"), [(1000, 3_504_872), (10, 2_236_682), (100, 2_351_972)]
)
def test_mobilenet_parameters(classes, count):
    assert parameters(MobileNetV2(classes=classes)) == count == mobilenet_parameters(classes)


def test_mobilenet_and_the_variant_of_pytorch_cifar():
    """github.com/kuangliu/pytorch-cifar has 2,296,922: 1x1 shortcuts where only channels differ,
    and an expansion in the first block.

    The paper has neither: it adds a block to its input where shapes are equal, and its first block
    does not expand.
    """
    shortcuts = sum(
        inputs * outputs + 2 * outputs
        for inputs, outputs in ((32, 16), (16, 24), (64, 96), (160, 320))
    )
    assert parameters(MobileNetV2()) + shortcuts + 32 * 32 + 2 * 32 == 2_296_922


def test_mobilenet_halves_the_image_three_times():
    network = MobileNetV2().eval()
    assert network.blocks(network.stem(torch.randn(1, 3, 32, 32))).shape == (1, 320, 4, 4)
    depthwise = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert len(depthwise) == 17
    assert all(m.groups == m.in_channels == m.out_channels for m in depthwise)
    assert sum(block.residual for block in network.blocks) == 10


# Published: 4.66 million (github.com/edmav4/BiPer, README); layers as in
# github.com/microsoft/LQ-Nets, cifar10-vgg-small.py.
@pytest.mark.parametrize(("classes", "count"), [(10, 4_660_106), (100, 5_397_476)])
def test_vgg_small_parameters(classes, count):
    channels = (3, 128, 128, 256, 256, 512, 512)
    convolutions = sum(9 * i * o + 2 * o for i, o in pairwise(channels))
    assert (
        parameters(VggSmall(classes=classes))
        == count
        == convolutions + 512 * 4 * 4 * classes + classes
    )


def test_vgg_small_cannot_halve_a_tiny_image():
    with pytest.raises(ValueError, match="image_size must be at least 8, not 7"):
        VggSmall(image_size=7)


def test_chartransformer_parameters():
    block = 4 * (128 * 128 + 128) + 2 * 128 * 512 + 512 + 128 + 4 * 128
    assert (
        parameters(CharTransformer(vocabulary=97))
        == 2 * 97 * 128 + 128 * 128 + 4 * block + 2 * 128
        == 834_560
    )
    # GPT-2 small has 124,439,808 (Radford et al., 2019; openai-community/gpt2), its head's weights
    # being the embedding's.
    with torch.device("meta"):
        gpt2 = CharTransformer(vocabulary=50257, context=1024, width=768, depth=12, heads=12)
    assert parameters(gpt2) - 50257 * 768 == 124_439_808


def test_chartransformer_takes_sequences_up_to_its_context():
    network = CharTransformer(vocabulary=11, context=6, width=8, depth=1, heads=2)
    assert network(torch.zeros(3, 4, dtype=torch.int64)).shape == (3, 4, 11)
    with pytest.raises(ValueError, match="7 symbols is longer than the context of 6"):
        network(torch.zeros(1, 7, dtype=torch.int64))


def test_chartransformer_sees_no_later_symbol():
    network = CharTransformer(vocabulary=11, context=12, width=16, depth=2, heads=2)
    symbols = torch.randint(11, (2, 12))
    for t in range(1, 12):
        other = symbols.clone()
        other[:, t:] = torch.randint(11, (2, 12 - t))
        assert torch.equal(network(symbols)[:, :t], network(other)[:, :t])


def test_mlp_parameters():
    network = build_model("mlp", in_channels=1, image_size=8, classes=10)
    assert parameters(network) == 64 * 256 + 256 + 256 * 256 + 256 + 256 * 10 + 10


def test_mlp1024_has_three_hidden_layers():
    network = build_model("mlp1024", in_channels=3, image_size=32, classes=10)
    assert [(m.in_features, m.out_features) for m in network if isinstance(m, nn.Linear)] == [
        (3072, 1024),
        (1024, 1024),
        (1024, 1024),
        (1024, 10),
    ]
    assert parameters(network) == 3072 * 1024 + 1024 + 2 * (1024 * 1024 + 1024) + 10240 + 10


# What summaries of the ResNet18 of github.com/kuangliu/pytorch-cifar (models/resnet.py) print for
# 10 and for 100 classes.
@pytest.mark.parametrize(("classes", "count"), [(10, 11_173_962), (100, 11_220_132)])
def test_resnet18_parameters(classes, count):
    network = ResNet18(classes=classes)
    assert parameters(network) == count
    assert (
        len([m for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)])
        + 1
        == 18
    )


def test_resnet18_halves_the_image_three_times():
    network = ResNet18(width=4)
    assert network.blocks(network.stem(torch.randn(2, 3, 32, 32))).shape == (2, 32, 4, 4)


def test_vit_parameters():
    # DeiT-Tiny (Touvron et al., 2021) has 5,717,416, of which a class token and its position take
    # 192 each.
    assert (
        parameters(VisionTransformer(image_size=224, patch_size=16, classes=1000, depth=12))
        == 5_717_416 - 2 * 192
    )
    block = 4 * (192 * 192 + 192) + 2 * 192 * 768 + 768 + 192 + 4 * 192
    patches, head = 3 * 16 * 192 + 192 + 64 * 192, 2 * 192 + 192 * 10 + 10
    assert parameters(VisionTransformer()) == patches + 6 * block + head == 2_693_194


def test_vit_attention_equals_torch():
    ours = VisionTransformer(width=24, depth=1).blocks[0].attention
    theirs = nn.MultiheadAttention(24, 3, batch_first=True)
    theirs.load_state_dict(
        {
            "in_proj_weight": ours.qkv.weight,
            "in_proj_bias": ours.qkv.bias,
            "out_proj.weight": ours.projection.weight,
            "out_proj.bias": ours.projection.bias,
        }
    )
    x = torch.randn(2, 5, 24)
    torch.testing.assert_close(
        ours(x), theirs(x, x, x, need_weights=False)[0], rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("options", [{"image_size": 30}, {"width": 190}])
def test_vit_checks_its_sizes(options):
    with pytest.raises(ValueError, match="must be a multiple of"):
        VisionTransformer(**options)


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        ("resnet18", 21),
        ("vit", 26),
        ("mlp1024", 4),
        ("resnet8x4", 11),
        ("resnet38", 40),
        ("resnet74", 76),
        ("mobilenetv2", 53),
        ("vgg-small", 7),
    ],
)
def test_every_gemm_with_a_weight_converts(model, layers):
    network = build_model(model, in_channels=3, image_size=32, classes=10)
    report = convert(network)
    assert (len(report.converted), report.skipped) == (layers, ())
    assert sum(isinstance(m, nn.Linear | nn.Conv2d) for m in network.modules()) == layers


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("in_channels", "size", "classes"), [(1, 8, 10), (1, 28, 10), (3, 32, 100)]
)
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
    assert network.blocks(
        torch.relu(network.bn(network.stem(torch.randn(2, 1, 32, 32))))
    ).shape == (2, 64, size, size)


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
    data = TensorDataModule(
        load_data("digits"), batch_size=batch_size, train_images=256, validation_images=100
    )
    module = Classifier(
        build_model("mlp", in_channels=1, image_size=8, classes=10), classes=10, **options
    )
    rates = Rates()
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[rates],
    )
    trainer.fit(module, data)
    return trainer, module, data, rates.rates


def test_recipe():
    trainer, _, _, rates = fit()
    optimizer = trainer.optimizers[0]
    assert isinstance(optimizer, torch.optim.SGD)
    group = optimizer.param_groups[0]
    assert (group["initial_lr"], group["momentum"], group["nesterov"], group["weight_decay"]) == (
        0.1,
        0.9,
        True,
        1e-4,
    )
    # Cosine over the whole run, step by step: 0.1 (1 + cos(pi t / 4)) / 2.
    assert rates == pytest.approx([0.1, 0.0853553, 0.05, 0.0146447], rel=1e-5)
    assert group["lr"] == pytest.approx(0.0, abs=1e-9)


def test_warmup_rises_to_the_learning_rate():
    *_, rates = fit(epochs=4, warmup_fraction=0.5, learning_rate=0.08)
    assert rates == pytest.approx(
        [0.02, 0.035, 0.05, 0.065, 0.08, 0.0682843, 0.04, 0.0117157], rel=1e-5
    )


def test_it_learns_and_logs():
    trainer, module, data, _ = fit(epochs=6, batch_size=32)
    assert {"train_loss", "val_loss", "val_accuracy"} <= trainer.callback_metrics.keys()
    (tested,) = trainer.test(module, data, verbose=False)
    assert tested["test_accuracy"] > 0.8
    with torch.no_grad():
        logits = module.eval()(data.test_images)
    assert tested["test_accuracy"] == pytest.approx(
        float((logits.argmax(1) == data.test_labels).float().mean())
    )
    assert tested["test_loss"] == pytest.approx(
        float(nn.functional.cross_entropy(logits, data.test_labels)), rel=1e-5
    )
