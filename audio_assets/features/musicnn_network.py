"""The MusiCNN music tagging networks, without TensorFlow.

The `musicnn` package carries TensorFlow checkpoints of the networks its authors trained on the
Million Song Dataset (``MSD_musicnn``) and on MagnaTagATune (``MTT_musicnn``); ``hatch_build.py``
puts them into this project's own wheel. Here their variables are read from the checkpoint format
itself and put into an ONNX graph, made in memory, that onnxruntime runs on one core: the workers
are what runs in parallel; or on a GPU, if there is one.

References
----------
J. Pons and X. Serra, "musicnn: Pre-trained convolutional neural networks for music audio
tagging", ISMIR late-breaking demo, 2019.

J. Pons, O. Nieto, M. Prockup, E. Schmidt, A. Ehmann and X. Serra, "End-to-end learning for music
audio tagging at scale", ISMIR, 2018.
"""

import hashlib
import os
import runpy
import struct
from base64 import urlsafe_b64encode
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import distribution
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper
from onnxruntime import InferenceSession, SessionOptions, get_available_providers

FloatArray = NDArray[np.float32]
ModelName = Literal["MSD_musicnn", "MTT_musicnn"]

_MEL_BANDS = 96

_CUDA = "CUDAExecutionProvider"

# Of the ONNX standard: versions that every onnxruntime this project allows can read.
_OPERATOR_SET = 17
_IR_VERSION = 8

# Zeros before and after the input of each front-end convolution in time, which keep its length;
# convolution i has the variables conv2d_i and is followed by batch_normalization_{i + 1}.
_FRONT_END_PADDING = ((3, 3), (3, 3), (63, 64), (31, 32), (15, 16))
_MID_END = (5, 6, 7)
_BATCH_NORM_EPSILON = 1e-3

# Training has left most filters of the front end with next to no weights. One that changes its
# channel by less than this times the largest value of the spectrum is left out.
_LEAST_EFFECT = 1e-4

_TABLE_MAGIC = 0xDB4775248B80FB57
_TABLE_FOOTER_SIZE = 48
_DT_FLOAT = 1


class WeightsError(Exception):
    """A file of the weights is missing or damaged."""


class DeviceError(Exception):
    """The GPU that the settings demand cannot be used."""


@dataclass(frozen=True)
class Network:
    """A trained network, ready to run.

    Parameters
    ----------
    tags : tuple of str
        The names of its 50 tags, in the order of its outputs.
    session : onnxruntime.InferenceSession
        A session of the model that `build_model` makes.
    """

    tags: tuple[str, ...]
    session: InferenceSession

    def run(self, patch: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Tag a patch of a log-mel spectrum.

        Parameters
        ----------
        patch : ndarray of float32, shape (frames, 96)
            ``log10(10000 * power + 1)`` of a mel spectrum with a hop of 16 ms; the networks were
            trained on patches of 187 frames.

        Returns
        -------
        activations : ndarray of float32, shape (50,)
            Sigmoid activation of each tag, 0..1.
        embedding : ndarray of float32, shape (200,)
            Activations of the penultimate layer, after its batch normalization.
        """
        activations, embedding = self.session.run(
            ["activations", "embedding"], {"patch": patch[np.newaxis, np.newaxis]}
        )
        return activations[0], embedding[0]


@cache
def load_network(model: ModelName) -> Network:
    """Load a network from the installed weights, once for each process.

    Parameters
    ----------
    model : {"MSD_musicnn", "MTT_musicnn"}
        The checkpoint: trained on the Million Song Dataset or on MagnaTagATune.

    Raises
    ------
    WeightsError
        If a file is missing or is not as this project's wheel recorded it.
    DeviceError
        If `AUDIO_ASSETS_DEVICE` is ``cuda`` and ONNX Runtime cannot use a GPU.
    """
    configuration = runpy.run_path(str(_weights_file("configuration.py")))
    variables = read_checkpoint(
        _weights_file(f"{model}/.index"), _weights_file(f"{model}/.data-00000-of-00001")
    )
    options = SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    # The arena would keep the convolutions' outputs of both networks: 35 MB, and no faster.
    options.enable_cpu_mem_arena = False
    # Every command checks the setting; to import the settings takes long, and no worker needs more.
    device = os.environ.get("AUDIO_ASSETS_DEVICE") or "auto"
    providers: list[str | tuple[str, dict[str, str]]] = ["CPUExecutionProvider"]
    if device != "cpu" and _CUDA in get_available_providers():
        # TF32 has too few digits; the exhaustive search takes longer than a file.
        providers.insert(0, (_CUDA, {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}))
    session = InferenceSession(
        build_model(variables).SerializeToString(), options, providers=providers
    )
    if device == "cuda" and _CUDA not in session.get_providers():
        raise DeviceError(
            "ONNX Runtime finds no GPU that it can use, but AUDIO_ASSETS_DEVICE is cuda: set it to "
            "auto, or install onnxruntime-gpu in place of onnxruntime"
        )
    return Network(tuple(configuration[model.replace("musicnn", "LABELS")]), session)


def _weights_file(name: str) -> Path:
    """Find a file among the weights, and check it for damage.

    The digest in the wheel's RECORD covers a whole file, the checkpoints' own CRC-32C only a
    variable each, and is faster to compute here.
    """
    for file in distribution("audio-assets").files or ():
        if file.as_posix() == f"audio_assets_weights/{name}" and file.hash is not None:
            path = Path(str(file.locate()))
            content = path.read_bytes() if path.is_file() else b""
            digest = hashlib.new(file.hash.mode, content).digest()
            if urlsafe_b64encode(digest).rstrip(b"=").decode() == file.hash.value:
                return path
    raise WeightsError(
        f"{name} of MusiCNN's weights is missing or damaged: `audio-assets doctor` says how to "
        "install them"
    )


# --- The checkpoint format: tensorflow/core/util/tensor_bundle ---------------------------------


def read_checkpoint(index: Path, data: Path) -> dict[str, FloatArray]:
    """Read the variables of a TensorFlow checkpoint of one shard ("tensor bundle", version 2).

    Parameters
    ----------
    index : Path
        The ``.index`` file: a table in LevelDB's format that maps the variables' names to
        ``BundleEntryProto`` messages.
    data : Path
        The ``.data-00000-of-00001`` file: the variables' values, little-endian.

    Returns
    -------
    dict of str to ndarray of float32
        Variables by name, in the shapes TensorFlow saved them.

    Raises
    ------
    ValueError
        If a file is not of this format, or a variable is not float32.
    """
    table, values = index.read_bytes(), data.read_bytes()
    if len(table) < _TABLE_FOOTER_SIZE or struct.unpack("<Q", table[-8:])[0] != _TABLE_MAGIC:
        raise ValueError(f"{index} is not a TensorFlow checkpoint index")
    footer = table[-_TABLE_FOOTER_SIZE:]
    *_, at = _read_handle(footer, 0)
    offset, size, _ = _read_handle(footer, at)
    variables: dict[str, FloatArray] = {}
    for _, handle in _read_block(table, offset, size):
        offset, size, _ = _read_handle(handle, 0)
        for key, entry in _read_block(table, offset, size):
            # The empty key holds the header of the bundle.
            if key:
                variables[key.decode()] = _read_variable(key.decode(), entry, values)
    return variables


def _read_variable(name: str, entry: bytes, values: bytes) -> FloatArray:
    """Read the value of the variable that a ``BundleEntryProto`` describes.

    Its fields are 1: data type, 2: shape (2: dimension (1: size)), 4: offset, 5: size in bytes;
    a field that is 0 is not written.
    """
    fields, messages = _read_message(entry)
    if fields.get(1) != _DT_FLOAT:
        raise ValueError(f"variable {name} of the checkpoint is not float32")
    _, shape = _read_message(messages[2][0])
    sizes = [_read_message(dimension)[0].get(1, 0) for dimension in shape.get(2, [])]
    value = np.frombuffer(values, "<f4", count=fields.get(5, 0) // 4, offset=fields.get(4, 0))
    return value.reshape(sizes)


def _read_message(message: bytes) -> tuple[dict[int, int], dict[int, list[bytes]]]:
    """Split a protocol buffer message into its numbers and its nested messages, by field."""
    numbers: dict[int, int] = {}
    messages: dict[int, list[bytes]] = {}
    at = 0
    while at < len(message):
        tag, at = _read_varint(message, at)
        field, wire_type = tag >> 3, tag & 7
        if wire_type == 0:
            numbers[field], at = _read_varint(message, at)
        elif wire_type == 2:
            length, at = _read_varint(message, at)
            messages.setdefault(field, []).append(message[at : at + length])
            at += length
        elif wire_type == 5:
            (numbers[field],) = struct.unpack_from("<I", message, at)
            at += 4
        else:
            raise ValueError("the checkpoint index holds a message of another kind")
    return numbers, messages


def _read_block(table: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield the keys and values of a block of a LevelDB table.

    A key is written as the number of bytes it shares with the key before it, and the rest. The
    block ends with restart points, which only searching needs, and their number.
    """
    if table[offset + size] != 0:
        raise ValueError("the checkpoint index is compressed")
    block = table[offset : offset + size]
    (restarts,) = struct.unpack("<I", block[-4:])
    at, end, key = 0, size - 4 * (restarts + 1), b""
    while at < end:
        shared, at = _read_varint(block, at)
        unshared, at = _read_varint(block, at)
        length, at = _read_varint(block, at)
        key = key[:shared] + block[at : at + unshared]
        at += unshared
        yield key, block[at : at + length]
        at += length


def _read_handle(data: bytes, at: int) -> tuple[int, int, int]:
    """Decode offset and size of a block; and where what follows them begins."""
    offset, at = _read_varint(data, at)
    size, at = _read_varint(data, at)
    return offset, size, at


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """Decode a number of seven bits a byte, lowest first; and where what follows it begins."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        shift, at = shift + 7, at + 1
        if byte < 0x80:
            return value, at


# --- The network -------------------------------------------------------------------------------


class _Channels(NamedTuple):
    """Channels of the front end: which depend on the spectrum, and what the others always are."""

    is_live: NDArray[np.bool_]
    constants: FloatArray  # 0 for the live ones

    def merge(self, weights: FloatArray) -> FloatArray:
        """Replace the weights of those that are constant by one's that is 1, after the live ones.

        The weights have the shape (channels, ...); channels of other layers follow.
        """
        count = len(self.is_live)
        of_ones = np.tensordot(self.constants, weights[:count], 1)[np.newaxis]
        return np.concatenate([weights[:count][self.is_live], of_ones, weights[count:]])


class _Graph:
    """An ONNX graph in the making; `constant` and `add` return the name of what they made."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []

    def constant(self, value: FloatArray) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def add(
        self, operator: str, *inputs: str, output: str = "", **attributes: int | list[int]
    ) -> str:
        output = output or f"value_{len(self.nodes)}"
        node = helper.make_node(operator, inputs, [output])
        node.attribute.extend(helper.make_attribute(*item) for item in attributes.items())
        self.nodes.append(node)
        return output

    def add_affine(self, value: str, scale: FloatArray, shift: FloatArray, output: str = "") -> str:
        scaled = self.add("Mul", value, self.constant(scale))
        return self.add("Add", scaled, self.constant(shift), output=output)


def build_model(variables: Mapping[str, FloatArray]) -> ModelProto:
    """Build the network of a checkpoint as an ONNX model.

    The batch normalizations are those of inference: a scale and a shift for each channel. Filters
    without effect are left out: 497 of 561 in ``MSD_musicnn``, 314 in ``MTT_musicnn``.

    Parameters
    ----------
    variables : mapping of str to ndarray of float32
        The variables of the checkpoint ``MSD_musicnn`` or ``MTT_musicnn``.

    Returns
    -------
    onnx.ModelProto
        Input ``patch`` of shape (1, 1, frames, 96); outputs ``activations`` of shape (1, 50) and
        ``embedding`` of shape (1, 200).
    """
    graph = _Graph()
    spectrum = graph.add_affine("patch", *_scale_and_shift(variables, 0))
    branches = [_channels(variables, branch) for branch in range(len(_FRONT_END_PADDING))]
    outputs = [
        _add_front_end_branch(graph, variables, branch, spectrum, channels.is_live)
        for branch, channels in enumerate(branches)
    ]
    # What the constant channels add up to is not constant where a convolution pads with zeros.
    peak = graph.add("ReduceMax", spectrum, axes=[3], keepdims=0)
    ones = graph.add("Cast", graph.add("Equal", peak, peak), to=TensorProto.FLOAT)
    layers = [graph.add("Concat", *outputs, ones, axis=1)]
    front_end = _Channels(*map(np.concatenate, zip(*branches, strict=True)))
    for layer in _MID_END:
        convolved = _add_mid_end_layer(graph, variables, layer, layers[-1], front_end)
        # The first has other channels than what it sees; the others have residual connections.
        layers.append(convolved if len(layers) == 1 else graph.add("Add", convolved, layers[-1]))
    _add_back_end(graph, variables, graph.add("Concat", *layers, axis=1), front_end)

    def value(name: str, *shape: int | str) -> ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    return helper.make_model(
        helper.make_graph(
            graph.nodes,
            "musicnn",
            [value("patch", 1, 1, "frames", _MEL_BANDS)],
            [value("activations", 1, "tags"), value("embedding", 1, "units")],
            graph.constants,
        ),
        opset_imports=[helper.make_opsetid("", _OPERATOR_SET)],
        ir_version=_IR_VERSION,
    )


def _channels(variables: Mapping[str, FloatArray], branch: int) -> _Channels:
    kernel, bias = _kernel_and_bias(variables, _numbered("conv2d", branch))
    scale, shift = _scale_and_shift(variables, branch + 1)
    is_live = np.abs(scale) * np.abs(kernel).sum(axis=(0, 1, 2)) >= _LEAST_EFFECT
    return _Channels(is_live, np.where(is_live, 0, np.maximum(bias, 0) * scale + shift))


def _add_front_end_branch(
    graph: _Graph,
    variables: Mapping[str, FloatArray],
    branch: int,
    spectrum: str,
    is_live: NDArray[np.bool_],
) -> str:
    """Add convolution, ReLU, batch normalization and maximum over frequency.

    The result has the shape (1, live channels, frames).

    ReLU, scale and shift are each monotonic, so they follow the maximum, on a fraction of the
    values. A negative scale turns the maximum into a minimum, taken as that of the negated
    convolution.
    """
    kernel, bias, scale, shift = (
        values[..., is_live]
        for values in (
            *_kernel_and_bias(variables, _numbered("conv2d", branch)),
            *_scale_and_shift(variables, branch + 1),
        )
    )
    sign = np.sign(scale)
    before, after = _FRONT_END_PADDING[branch]
    convolved = graph.add(
        "Conv",
        spectrum,
        graph.constant(kernel.transpose(3, 2, 0, 1) * sign[:, np.newaxis, np.newaxis, np.newaxis]),
        graph.constant(bias * sign),
        pads=[before, 0, after, 0],
    )
    peak = graph.add("ReduceMax", convolved, axes=[3], keepdims=0)
    rectified = graph.add("Relu", graph.add("Mul", peak, graph.constant(sign[:, np.newaxis])))
    return graph.add_affine(rectified, scale[:, np.newaxis], shift[:, np.newaxis])


def _add_mid_end_layer(
    graph: _Graph,
    variables: Mapping[str, FloatArray],
    layer: int,
    features: str,
    front_end: _Channels,
) -> str:
    """Add a convolution in time over all channels, ReLU and batch normalization."""
    kernel, bias = _kernel_and_bias(variables, _numbered("conv2d", layer))
    scale, shift = _scale_and_shift(variables, layer + 1)
    weights = kernel[:, :, 0, :].transpose(1, 2, 0)
    if layer == _MID_END[0]:
        weights = front_end.merge(weights)
    constants = graph.constant(weights.transpose(1, 0, 2)), graph.constant(bias)
    convolved = graph.add("Conv", features, *constants, pads=[3, 3])
    rectified = graph.add("Relu", convolved)
    return graph.add_affine(rectified, scale[:, np.newaxis], shift[:, np.newaxis])


def _add_back_end(
    graph: _Graph, variables: Mapping[str, FloatArray], features: str, front_end: _Channels
) -> None:
    """Add maximum and mean over time, a dense layer (the embedding), another (the tags)."""
    maximum, mean = (graph.add(f"Global{kind}Pool", features) for kind in ("Max", "Average"))
    pooled = graph.add("Flatten", graph.add("Concat", maximum, mean, axis=2))
    # The batch normalization before the dense layer is folded into it.
    scale, shift = _scale_and_shift(variables, 9)
    kernel, bias = _kernel_and_bias(variables, "dense")
    units = kernel.shape[1]
    of_channels = (scale[:, np.newaxis] * kernel).reshape(-1, 2, units)
    weights = graph.constant(front_end.merge(of_channels).reshape(-1, units))
    dense = graph.add("Gemm", pooled, weights, graph.constant(shift @ kernel + bias))
    embedding = graph.add_affine(
        graph.add("Relu", dense), *_scale_and_shift(variables, 10), output="embedding"
    )
    kernel, bias = _kernel_and_bias(variables, "dense_1")
    logits = graph.add("Gemm", embedding, graph.constant(kernel), graph.constant(bias))
    graph.add("Sigmoid", logits, output="activations")


def _kernel_and_bias(
    variables: Mapping[str, FloatArray], layer: str
) -> tuple[FloatArray, FloatArray]:
    return variables[f"{layer}/kernel"], variables[f"{layer}/bias"]


def _scale_and_shift(
    variables: Mapping[str, FloatArray], number: int
) -> tuple[FloatArray, FloatArray]:
    """Get what a batch normalization multiplies by and adds, for each channel."""
    layer = _numbered("batch_normalization", number)
    deviation = np.sqrt(variables[f"{layer}/moving_variance"] + np.float32(_BATCH_NORM_EPSILON))
    scale = variables[f"{layer}/gamma"] / deviation
    return scale, variables[f"{layer}/beta"] - variables[f"{layer}/moving_mean"] * scale


def _numbered(layer: str, number: int) -> str:
    """Return TensorFlow's name for a layer of a kind: the first has no number."""
    return f"{layer}_{number}" if number else layer
