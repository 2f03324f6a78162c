"""Data files are checked before they are trusted; loaders repeat and resume exactly."""

import bz2
import errno
import gzip
import hashlib
import io
import itertools
import lzma
import pickle
import struct
import tarfile
import tracemalloc
from contextlib import suppress

import lightning as L
import numpy as np
import pytest
import torch

from dynasty_lightning.files import DamagedFile
from dynasty_lightning.tasks.data import DATASETS, TensorDataModule, load_data
from dynasty_lightning.tasks.data import files as data_files
from dynasty_lightning.tasks.data.files import ImageData
from dynasty_lightning.tasks.data.loader import WindowLoader
from dynasty_lightning.tasks.data.module import TensorLoader
from dynasty_lightning.tasks.models import Classifier, build_model


def image_data(*, images=20, channels=1, size=4, name="digits"):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (images, channels, size, size), dtype=np.uint8)
    labels = np.arange(images, dtype=np.int64) % 10
    return ImageData(
        name=name,
        classes=10,
        class_names=[str(i) for i in range(10)],
        train_images=pixels,
        train_labels=labels,
        test_images=pixels[:5],
        test_labels=labels[:5],
    )


def loader(*, images=10, batch_size=3, shuffle=True, seed=0, augment=False):
    x = torch.arange(images * 16 * 16 * 3, dtype=torch.float32).view(images, 3, 16, 16)
    return TensorLoader(
        x, torch.arange(images), batch_size=batch_size, shuffle=shuffle, seed=seed, augment=augment
    )


def labels_of(batches):
    return [batch[1].tolist() for batch in batches]


# -- Digits


def test_digits_split_is_fixed_and_stratified():
    data = load_data("digits")
    assert data.train_images.shape == (1437, 1, 8, 8)
    assert data.test_images.shape == (360, 1, 8, 8)
    assert data.train_images.dtype == np.uint8
    assert data.train_images.max() == 255
    counts = np.bincount(data.test_labels)
    assert counts.min() >= 34
    assert counts.max() <= 37
    again = load_data("digits")
    np.testing.assert_array_equal(again.test_images, data.test_images)
    # The split that figures were made on: a new scikit-learn must not change it silently.
    assert hashlib.md5(data.test_labels.tobytes()).hexdigest() == "eff59bacc24de44fc202d2b2edba0705"


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match=r"'mnist'.*digits, fashion-mnist, cifar100"):
        load_data("mnist")
    assert DATASETS == ("digits", "fashion-mnist", "cifar100")


# -- Fashion-MNIST


def idx(array):
    return (
        bytes([0, 0, 8, array.ndim])
        + struct.pack(f">{array.ndim}i", *array.shape)
        + array.tobytes()
    )


@pytest.fixture
def small_fashion_mnist(tmp_path, monkeypatch):
    """A folder of small idx files that the reader takes for the official ones."""
    rng = np.random.default_rng(0)
    contents = {}
    for split, count in (("train", 6), ("t10k", 4)):
        contents[f"{split}-images-idx3-ubyte"] = idx(
            rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        )
        contents[f"{split}-labels-idx1-ubyte"] = idx(np.arange(count, dtype=np.uint8))
    for name, content in contents.items():
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
    monkeypatch.setattr(
        data_files,
        "_FASHION_MNIST_MD5",
        {n: hashlib.md5(c).hexdigest() for n, c in contents.items()},
    )
    return tmp_path


def test_fashion_mnist_from_a_folder(small_fashion_mnist, monkeypatch):
    data = load_data("fashion-mnist", small_fashion_mnist)
    assert data.train_images.shape == (6, 1, 28, 28)
    assert data.test_labels.tolist() == [0, 1, 2, 3]
    monkeypatch.setenv("DYNASTY_DATA", str(small_fashion_mnist))
    np.testing.assert_array_equal(load_data("fashion-mnist").train_images, data.train_images)


def test_fashion_mnist_unpacked_files_will_do(small_fashion_mnist):
    for path in small_fashion_mnist.glob("*.gz"):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    assert load_data("fashion-mnist", small_fashion_mnist).test_images.shape == (4, 1, 28, 28)


def test_fashion_mnist_wrong_md5(small_fashion_mnist):
    path = small_fashion_mnist / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(idx(np.zeros(4, np.uint8))))
    with pytest.raises(
        ValueError, match=r"t10k-labels.* has md5 .* not the official .*: delete it"
    ):
        load_data("fashion-mnist", small_fashion_mnist)


def test_fashion_mnist_damaged_or_lacking(small_fashion_mnist):
    path = small_fashion_mnist / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="is damaged"):
        load_data("fashion-mnist", small_fashion_mnist)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="lacks t10k-labels"):
        load_data("fashion-mnist", small_fashion_mnist)


def test_fashion_mnist_wrong_magic_number(small_fashion_mnist, monkeypatch):
    content = b"\0\0\x0d\x01" + bytes(8)
    name = "t10k-labels-idx1-ubyte"
    (small_fashion_mnist / f"{name}.gz").write_bytes(gzip.compress(content))
    monkeypatch.setitem(data_files._FASHION_MNIST_MD5, name, hashlib.md5(content).hexdigest())
    with pytest.raises(ValueError, match="no idx file of unsigned bytes"):
        load_data("fashion-mnist", small_fashion_mnist)


def test_missing_folder_says_what_to_install(tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match=r"install Debian's package dataset-fashion-mnist.*--data-dir or DYNASTY_DATA",
    ):
        load_data("fashion-mnist", tmp_path / "nowhere")


def test_the_installed_fashion_mnist():
    if not data_files._DEBIAN_FASHION_MNIST.is_dir():
        pytest.skip("needs Debian's package dataset-fashion-mnist")
    data = load_data("fashion-mnist")
    assert data.train_images.shape == (60000, 1, 28, 28)
    assert data.test_images.shape == (10000, 1, 28, 28)
    assert np.bincount(data.test_labels).tolist() == [1000] * 10


# -- CIFAR-100


@pytest.fixture
def small_cifar100(tmp_path, monkeypatch):
    """A folder with an archive of small files that the reader takes for the official ones; the
    cache is in tmp_path too.
    """
    rng = np.random.default_rng(0)
    contents = {}
    for split, count in (("train", 5), ("test", 3)):
        pixels = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        contents[split] = pickle.dumps(
            {b"data": pixels, b"fine_labels": list(range(count))}, protocol=4
        )
    contents["meta"] = pickle.dumps({b"fine_label_names": [b"apple", b"aquarium_fish"]}, protocol=4)
    monkeypatch.setattr(
        data_files, "_CIFAR100_MD5", {n: hashlib.md5(c).hexdigest() for n, c in contents.items()}
    )
    monkeypatch.delenv("DYNASTY_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("DYNASTY_DATA", raising=False)
    folder = tmp_path / "downloads"
    folder.mkdir()
    with tarfile.open(folder / "cifar-100-python.tar.xz", "w:xz") as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(f"cifar-100-python/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return folder


def test_cifar100_archive_is_unpacked_once_into_the_cache(small_cifar100, tmp_path):
    data = load_data("cifar100", small_cifar100)
    assert data.train_images.shape == (5, 3, 32, 32)
    assert data.test_labels.tolist() == [0, 1, 2]
    assert list(data.class_names) == ["apple", "aquarium fish"]
    cache = tmp_path / "cache" / "dynasty-lightning" / "cifar-100-python"
    assert sorted(p.name for p in cache.iterdir()) == ["meta", "test", "train"]
    assert [p.name for p in small_cifar100.iterdir()] == ["cifar-100-python.tar.xz"]
    (small_cifar100 / "cifar-100-python.tar.xz").unlink()
    assert load_data("cifar100").train_images.shape == (5, 3, 32, 32)  # from the cache
    assert load_data("cifar100", cache).train_images.shape == (5, 3, 32, 32)
    assert load_data("cifar100", cache.parent).train_images.shape == (5, 3, 32, 32)


def test_cifar100_by_the_path_of_its_archive(small_cifar100):
    assert load_data("cifar100", small_cifar100 / "cifar-100-python.tar.xz").train_images.shape == (
        5,
        3,
        32,
        32,
    )


def test_cifar100_md5_is_checked_before_unpickling(small_cifar100, tmp_path, monkeypatch):
    load_data("cifar100", small_cifar100)
    cache = tmp_path / "cache" / "dynasty-lightning" / "cifar-100-python"
    (cache / "meta").write_bytes(b"not even a pickle")
    monkeypatch.setattr(
        data_files,
        "_unpickle",
        lambda content: (
            pytest.fail("unpickled") if b"even" in content else {b"data": [], b"fine_labels": []}
        ),
    )
    with pytest.raises(ValueError, match=r"meta has md5 .*: delete it"):
        load_data("cifar100", cache)


def test_cifar100_wrong_archive_leaves_nothing_in_the_cache(small_cifar100, tmp_path, monkeypatch):
    monkeypatch.setitem(data_files._CIFAR100_MD5, "train", "0" * 32)
    with pytest.raises(ValueError, match=r"cifar-100-python.tar.xz/train has md5"):
        load_data("cifar100", small_cifar100)
    assert not list((tmp_path / "cache").rglob("train"))


def test_cifar100_damaged_archive(small_cifar100):
    archive = small_cifar100 / "cifar-100-python.tar.xz"
    archive.write_bytes(archive.read_bytes()[:200])
    with pytest.raises(ValueError, match="is damaged or no archive"):
        load_data("cifar100", small_cifar100)


ARCHIVES = {"gz": gzip.open, "bz2": bz2.open, "xz": lzma.open, "plain": open}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_an_archive_of_gigabytes_is_refused_before_it_is_unpacked(
    small_cifar100, tmp_path, monkeypatch, kind
):
    """Also where the size is one that tarfile believes: of a member, of one that is passed over, of
    a header of its own.
    """
    monkeypatch.setattr(data_files, "_MOST_BYTES", 1 << 20)
    archive = small_cifar100 / "cifar-100-python.tar.xz"
    for name, form in (
        ("cifar-100-python/train", tarfile.REGTYPE),
        ("padding", tarfile.REGTYPE),
        ("header", tarfile.XHDTYPE),
    ):
        member = tarfile.TarInfo(name)
        member.type, member.size = form, 8 << 30
        with ARCHIVES[kind](archive, "wb") as file:
            file.write(member.tobuf(tarfile.GNU_FORMAT))
            for _ in range(4):
                file.write(bytes(1 << 20))
        tracemalloc.start()
        with pytest.raises(
            DamagedFile, match=r"tar\.xz unpacks to more than 1,048,576 bytes.*: fetch it again"
        ):
            load_data("cifar100", small_cifar100)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
        tracemalloc.stop()
    assert not list((tmp_path / "cache").rglob("train"))


def test_a_packed_idx_file_of_gigabytes_is_refused_before_its_md5(small_fashion_mnist, monkeypatch):
    monkeypatch.setattr(data_files, "_MOST_BYTES", 1 << 20)
    (small_fashion_mnist / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8 << 20)))
    monkeypatch.setattr(
        data_files,
        "_check_md5",
        lambda path, *_: "t10k-labels" in path.name and pytest.fail("md5 of too much"),
    )
    with pytest.raises(DamagedFile, match=r"t10k-labels-idx1-ubyte\.gz unpacks to more than"):
        load_data("fashion-mnist", small_fashion_mnist)
    path = small_fashion_mnist / "t10k-labels-idx1-ubyte"
    path.with_suffix(".gz").unlink()
    path.write_bytes(bytes(2 << 20))
    with pytest.raises(DamagedFile, match="t10k-labels-idx1-ubyte is larger than"):
        load_data("fashion-mnist", small_fashion_mnist)


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz", "plain"])
def test_no_damaged_archive_ends_in_an_error_of_the_standard_library(small_cifar100, kind):
    with lzma.open(small_cifar100 / "cifar-100-python.tar.xz") as file:
        tar = file.read()
    archive = small_cifar100 / "cifar-100-python.tar"
    (small_cifar100 / "cifar-100-python.tar.xz").unlink()
    with ARCHIVES[kind](archive, "wb") as file:
        file.write(tar)
    whole, generator = archive.read_bytes(), np.random.default_rng(0)
    for cut in (*generator.integers(0, len(whole), 5), *[None] * 25):
        data = bytearray(whole[:cut])
        for at in generator.integers(0, len(whole), 0 if cut is not None else 3):
            data[at] = generator.integers(0, 256)
        archive.write_bytes(data)
        with suppress(DamagedFile):  # and nothing else
            load_data("cifar100", archive)
        for path in data_files._cache().iterdir():
            path.unlink()


def test_a_disk_that_fails_is_no_damaged_archive(small_cifar100, monkeypatch):
    def fails(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(data_files._Bounded, "read", fails)
    with pytest.raises(OSError, match="Input/output error"):
        load_data("cifar100", small_cifar100)


def test_cifar100_archive_that_lacks_a_file(small_cifar100):
    with tarfile.open(small_cifar100 / "cifar-100-python.tar.xz", "w:xz"):
        pass
    with pytest.raises(ValueError, match="lacks train, test, meta"):
        load_data("cifar100", small_cifar100)


def test_cifar100_missing(small_cifar100, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no CIFAR-100 in .*nowhere.*--data-dir or DYNASTY_DATA"
    ):
        load_data("cifar100", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no CIFAR-100 in any known folder"):
        load_data("cifar100")


def test_unpickler_refuses_code():
    class Attack:
        def __reduce__(self):
            return print, ("run",)

    for protocol in (0, 2, 4):
        with pytest.raises(
            ValueError, match=r"wants to load \S+; a CIFAR file holds arrays and lists only"
        ):
            data_files._unpickle(pickle.dumps({b"data": Attack()}, protocol=protocol))


# -- Data module


def test_images_are_normalised_by_all_training_images():
    data = image_data(images=200, channels=3)
    module = TensorDataModule(data, train_images=50)
    pixels = data.train_images.astype(np.float64) / 255
    mean, deviation = pixels.mean((0, 2, 3), keepdims=True), pixels.std((0, 2, 3), keepdims=True)
    expected = (data.test_images / 255 - mean) / deviation
    np.testing.assert_allclose(module.test_images.numpy(), expected, atol=1e-6)
    assert module.test_images.dtype == torch.float32


def test_train_and_validation_images_are_disjoint_and_do_not_depend_on_the_seed():
    def chosen(seed):
        module = TensorDataModule(
            image_data(), batch_size=30, train_images=12, validation_images=5, seed=seed
        )
        (train, _), (held, _) = (
            next(iter(module.train_dataloader())),
            next(iter(module.val_dataloader())),
        )
        return {x.numpy().tobytes() for x in train}, {x.numpy().tobytes() for x in held}

    train, held = chosen(0)
    assert (len(train), len(held)) == (12, 5)
    assert not train & held
    assert chosen(1) == (train, held)


def test_only_cifar_is_augmented():
    assert TensorDataModule(image_data(name="cifar100", channels=3)).train_dataloader().augment
    assert not TensorDataModule(image_data()).train_dataloader().augment
    assert not TensorDataModule(image_data(name="cifar100", channels=3)).test_dataloader().augment


@pytest.mark.parametrize(
    "options",
    [
        {"train_images": 21},
        {"train_images": 0},
        {"validation_images": 20},
        {"train_images": 16, "validation_images": 5},
    ],
)
def test_more_images_than_there_are(options):
    with pytest.raises(ValueError, match="digits has 20 training images"):
        TensorDataModule(image_data(), **options)


# -- Loader


def test_an_epoch_shows_every_image_once():
    seen = labels_of(loader())
    assert [len(b) for b in seen] == [3, 3, 3, 1]
    assert sorted(itertools.chain.from_iterable(seen)) == list(range(10))


def test_order_depends_on_seed_and_epoch_alone():
    first = loader()
    epochs = [labels_of(first), labels_of(first)]
    assert epochs[0] != epochs[1]
    again = loader()
    torch.manual_seed(99)
    torch.rand(3)
    assert [labels_of(again), labels_of(again)] == epochs
    assert labels_of(loader(seed=1)) not in epochs
    assert labels_of(loader(shuffle=False)) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]


@pytest.mark.parametrize("stop", range(9))
def test_resume_goes_on_with_the_very_next_batch(stop):
    def stream(source, count):
        while count > 0:
            for batch in source:
                yield batch
                count -= 1
                if not count:
                    return

    expected = list(stream(loader(augment=True), 12))
    interrupted = loader(augment=True)
    list(stream(interrupted, stop))
    resumed = loader(augment=True)
    resumed.load_state_dict(interrupted.state_dict())
    got = list(stream(resumed, 12 - stop))
    assert labels_of(got) == labels_of(expected[stop:])
    for (x, _), (y, _) in zip(got, expected[stop:], strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"batch_size": 5},
            "with batch_size=3, and this loader has batch_size=5: go on with 3, or",
        ),
        ({"batch_size": 1}, "with batch_size=3, and this loader has batch_size=1"),
        ({"seed": 4}, "with seed=0, and this loader has seed=4"),
        ({"images": 11}, "with samples=10, and this loader has samples=11"),
    ],
)
def test_the_middle_of_an_epoch_is_nowhere_in_another_ones_and_its_end_is(other, message):
    source = loader()
    batches = iter(source)
    next(batches)
    with pytest.raises(ValueError, match=f"in the middle of an epoch {message}"):
        loader(**other).load_state_dict(source.state_dict())
    list(batches)
    resumed, expected = loader(**other), loader(**other)
    resumed.load_state_dict(source.state_dict())
    list(expected)
    assert labels_of(resumed) == labels_of(expected)  # the second epoch


def test_a_batch_may_be_shared_out_among_other_ranks(monkeypatch):
    source = loader(batch_size=4)
    next(iter(source))
    expected = labels_of(source)[:2]
    monkeypatch.setattr(TensorLoader, "_shard", (0, 2))
    with pytest.raises(ValueError, match="with ranks=1, and this loader has ranks=2"):
        loader(batch_size=4).load_state_dict(
            loader(batch_size=4).state_dict() | {"next_batch": 1, "ranks": 1}
        )
    resumed = loader(batch_size=2)
    resumed.load_state_dict({**resumed.state_dict(), "next_batch": 1, "batch_size": 4, "ranks": 1})
    assert labels_of(resumed)[:2] == [batch[::2] for batch in expected]


def test_windows_of_another_text_are_not_gone_on_with():
    def windows(length):
        return WindowLoader(
            np.zeros(length, np.uint8), context=4, batch_size=2, shuffle=True, samples=5
        )

    source = windows(100)
    next(iter(source))
    with pytest.raises(ValueError, match="with available=24, and this loader has available=23"):
        windows(96).load_state_dict(source.state_dict())


@pytest.mark.parametrize("odd", [None, -1, 1.0, True, "1", 4, "lacking"])
@pytest.mark.parametrize(
    "name", ["epoch", "next_batch", "batch_size", "ranks", "seed", "samples", "available"]
)
def test_odd_states_of_a_loader_are_refused_by_the_name_of_the_number(name, odd):
    state = loader().state_dict() | {"next_batch": 1}
    if odd == "lacking":
        del state[name]
    else:
        state[name] = odd
    if (name, odd) == ("epoch", 4):
        return  # as good as any
    with pytest.raises(
        ValueError,
        match=f"lacks {name}, or has|with {name}=4, and this|is at batch 4 of an epoch of 4",
    ):
        loader().load_state_dict(state)


def test_training_goes_on_after_an_epoch_left_early_and_evaluation_starts_anew():
    source, whole = loader(), loader()
    expected = labels_of(whole) + labels_of(whole)
    next(iter(source))
    assert labels_of(source) == expected[1:5]
    assert labels_of(source) == [*expected[5:8], labels_of(whole)[0]]
    source = loader(shuffle=False)
    next(iter(source))  # Lightning's sanity check, say
    assert labels_of(source) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]


def test_augmentation_shifts_and_flips_whole_images():
    x = torch.arange(1.0, 1 + 3 * 16 * 16).view(1, 3, 16, 16).repeat(64, 1, 1, 1)
    source = TensorLoader(
        x, torch.zeros(64, dtype=torch.int64), batch_size=64, shuffle=False, augment=True
    )
    images = next(iter(source))[0]
    assert images.shape == x.shape
    padded = torch.nn.functional.pad(x[0], [4] * 4)
    crops = {
        torch.flip(padded, [-1] * f)[:, i : i + 16, j : j + 16].numpy().tobytes()
        for f in (0, 1)
        for i in range(9)
        for j in range(9)
    }
    found = {image.numpy().tobytes() for image in images}
    assert found <= crops
    assert len(found) > 30


def test_loader_checks_its_arguments():
    with pytest.raises(ValueError, match="batch_size must be at least 1, not 0"):
        loader(batch_size=0)
    with pytest.raises(ValueError, match="3 images do not go with 2 labels"):
        TensorLoader(torch.zeros(3, 1, 2, 2), torch.zeros(2), batch_size=1, shuffle=False)


@pytest.mark.parametrize("steps", [3, 5, 7, 10])
def test_lightning_resumes_bit_for_bit(tmp_path, steps):
    def fit(max_steps, checkpoint=None):
        torch.manual_seed(0)
        data = TensorDataModule(image_data(size=8), batch_size=4, seed=3, augment=True)
        model = Classifier(build_model("mlp", in_channels=1, image_size=8, classes=10), classes=10)
        # The schedule spans the run: the same length in all.
        model.configure_optimizers = lambda: torch.optim.SGD(
            model.parameters(), lr=0.1, momentum=0.9
        )
        trainer = L.Trainer(
            max_steps=max_steps,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        )
        trainer.fit(model, data, ckpt_path=checkpoint)
        return trainer, model

    _, unbroken = fit(12)
    trainer, _ = fit(steps)
    trainer.save_checkpoint(tmp_path / "part.ckpt")
    _, resumed = fit(12, tmp_path / "part.ckpt")
    for name, value in unbroken.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
