import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as pb
from tritonclient.utils import serialize_byte_tensor

from services.errors import InvalidInputError, UnsupportedError
from services.inference.tensors import (
    TensorSpec,
    check_inputs,
    decimals,
    read_inputs,
    read_requested_outputs,
    texts,
    write_outputs,
)

PROMPT = TensorSpec(name="PROMPT", field="prompt", datatype="BYTES", dims=("n",))
AUDIO = TensorSpec(name="AUDIO", field="audio", datatype="FP32", dims=("n", "samples"), optional=True)
SEED = TensorSpec(name="SEED", field="seed", datatype="INT64", dims=("n",), optional=True, one_for_all=True)
STEPS = TensorSpec(name="STEPS", field="num_inference_steps", datatype="INT32", dims=("n",), optional=True)
MAX_ROWS = 8
SPECS = (PROMPT, AUDIO, SEED, STEPS)


def _request(*inputs: Any, raw: list[bytes] | None = None) -> pb.ModelInferRequest:
    return pb.ModelInferRequest(inputs=inputs, raw_input_contents=raw)


def _input(name: str, datatype: str, shape: list[int], **contents: Any) -> Any:
    kind = pb.ModelInferRequest.InferInputTensor
    if not contents:
        return kind(name=name, datatype=datatype, shape=shape)
    return kind(name=name, datatype=datatype, shape=shape, contents=pb.InferTensorContents(**contents))


ONE = _input("PROMPT", "BYTES", [1], bytes_contents=[b"a dog"])


def _faults(request: pb.ModelInferRequest) -> dict[str, str]:
    with pytest.raises(InvalidInputError) as caught:
        read_inputs(request, SPECS, MAX_ROWS)
    return {violation.field: violation.description for violation in caught.value.violations}


def test_typed_contents_of_every_datatype() -> None:
    read = read_inputs(
        _request(
            _input("PROMPT", "BYTES", [2], bytes_contents=[b"a dog", b"\x00"]),
            _input("AUDIO", "FP32", [2, 2], fp32_contents=[0.5, -1, 0, 1]),
            _input("SEED", "INT64", [1], int64_contents=[2**40]),
            _input("STEPS", "INT32", [2], int_contents=[1, 2]),
        ),
        SPECS,
        MAX_ROWS,
    )
    assert read["PROMPT"].tolist() == [b"a dog", b"\x00"]
    assert read["AUDIO"].tolist() == [[0.5, -1], [0, 1]]
    assert (read["SEED"].tolist(), read["STEPS"].tolist()) == ([2**40], [1, 2])
    assert [read[name].dtype for name in ("AUDIO", "SEED", "STEPS")] == [np.float32, np.int64, np.int32]


@given(st.lists(st.binary(max_size=8), min_size=1, max_size=4))
def test_raw_bytes_are_those_that_tritonclient_writes(elements: list[bytes]) -> None:
    raw = serialize_byte_tensor(np.array(elements, dtype=np.object_)).item()
    read = read_inputs(_request(_input("PROMPT", "BYTES", [len(elements)]), raw=[raw]), SPECS, MAX_ROWS)
    assert read["PROMPT"].tolist() == elements


@given(st.binary(max_size=24))
def test_any_raw_bytes_are_read_or_refused(raw: bytes) -> None:
    request = _request(_input("PROMPT", "BYTES", [1]), raw=[raw or b"\x00"])
    if len(raw) >= 4 and len(raw) == 4 + struct.unpack_from("<I", raw)[0]:
        assert read_inputs(request, SPECS, MAX_ROWS)["PROMPT"].tolist() == [raw[4:]]
    else:
        assert _faults(request)["prompt"].startswith("tensor PROMPT")


@pytest.mark.parametrize(
    ("inputs", "field", "says"),
    [
        ([], "prompt", "tensor PROMPT is missing, expected BYTES [n]"),
        ([ONE, ONE], "prompt", "tensor PROMPT is given twice"),
        ([ONE, _input("FOO", "FP32", [1])], "inputs", "'FOO', expected some of PROMPT, AUDIO, SEED, STEPS"),
        ([_input("PROMPT", "FP32", [1], fp32_contents=[1])], "prompt", "datatype FP32, expected BYTES [n]"),
        ([_input("PROMPT", "", [1])], "prompt", "datatype (none)"),
        (
            [_input("PROMPT", "BYTES", [1, 1], bytes_contents=[b"a"])],
            "prompt",
            "shape [1, 1], expected BYTES",
        ),
        ([_input("PROMPT", "BYTES", [], bytes_contents=[b"a"])], "prompt", "shape []"),
        ([_input("PROMPT", "BYTES", [-1], bytes_contents=[b"a"])], "prompt", "shape [-1]"),
        ([_input("PROMPT", "BYTES", [2], bytes_contents=[b"a"])], "prompt", "1 elements, expected 2"),
        ([_input("PROMPT", "BYTES", [2**62])], "prompt", "rows, expected between 1 and 8; split them"),
        ([_input("PROMPT", "BYTES", [0])], "prompt", "has 0 rows, expected between 1 and 8"),
        ([ONE, _input("SEED", "INT64", [1], int_contents=[1])], "seed", "0 elements in int64_contents"),
        ([ONE, _input("SEED", "INT32", [1])], "seed", "expected INT64 [n], or [1] for all"),
        (
            [ONE, _input("AUDIO", "FP32", [2], fp32_contents=[0, 0])],
            "audio",
            "shape [2], expected FP32 [n, samples]",
        ),
        (
            [ONE, _input("STEPS", "INT32", [2], int_contents=[1, 2])],
            "num_inference_steps",
            "tensor STEPS has 2 rows, expected 1, as many as PROMPT",
        ),
    ],
)
def test_what_is_not_as_described_names_tensor_expected_and_actual(
    inputs: list[Any], field: str, says: str
) -> None:
    assert says in _faults(_request(*inputs))[field]


def test_every_fault_is_told_at_once() -> None:
    assert set(_faults(_request(_input("SEED", "INT32", [1]), _input("FOO", "X", [])))) == {
        "prompt",
        "seed",
        "inputs",
    }


@pytest.mark.parametrize(
    ("raw", "field", "says"),
    [
        ([b"\x01\x00\x00\x00a", b""], "raw_input_contents", "2 elements, expected 1"),
        ([b"\x05\x00\x00\x00a"], "prompt", "has length 5 for element 0, but only 1 bytes are left"),
        ([b"\x01\x00\x00"], "prompt", "ends with 3 bytes, expected the 4 bytes of a length"),
        ([b"\xff\xff\xff\xff"], "prompt", "has length 4294967295"),
        ([bytes(4_000_000)], "prompt", "holds more than the 1 elements"),
    ],
)
def test_raw_contents_that_do_not_fit(raw: list[bytes], field: str, says: str) -> None:
    assert says in _faults(_request(_input("PROMPT", "BYTES", [1]), raw=raw))[field]


def test_raw_numbers_that_do_not_fit() -> None:
    inputs = [_input("PROMPT", "BYTES", [1]), _input("SEED", "INT64", [1])]
    says = _faults(_request(*inputs, raw=[b"\x01\x00\x00\x00a", b"\x00" * 4]))["seed"]
    assert says == "tensor SEED holds 4 bytes, expected 8: INT64 [1]"


def test_raw_and_typed_at_once() -> None:
    assert "give only one of them" in _faults(_request(ONE, raw=[b"\x01\x00\x00\x00a"]))["prompt"]


def test_shared_memory_is_not_offered() -> None:
    tensor = _input("PROMPT", "BYTES", [1])
    tensor.parameters["shared_memory_region"].string_param = "region"
    with pytest.raises(UnsupportedError, match="'PROMPT' is in shared memory"):
        read_inputs(_request(tensor), SPECS, MAX_ROWS)
    output = pb.ModelInferRequest.InferRequestedOutputTensor(name="AUDIO")
    output.parameters["shared_memory_region"].string_param = "region"
    with pytest.raises(UnsupportedError, match="'AUDIO' is in shared memory"):
        read_requested_outputs(pb.ModelInferRequest(outputs=[output]), SPECS)


def test_text_is_utf_8() -> None:
    read = {"PROMPT": np.array([b"a", b"ab\xff"], dtype=object)}
    made, (fault,) = texts(read, PROMPT)
    assert made == ["a", ""]
    assert (fault.field, fault.description[:42]) == (
        "prompt[1]",
        "tensor PROMPT is not UTF-8 from byte 2 on;",
    )


def test_fp32_means_the_decimal_that_was_meant() -> None:
    assert decimals(np.array([0.64, 3.1, 1 / 3, 1e38], dtype=np.float32)) == [0.64, 3.1, 0.33333334, 1e38]


def test_tensors_that_another_server_has_read_are_checked_the_same() -> None:
    right = {"PROMPT": np.array([b"a", b"b"], dtype=object), "SEED": np.array([1], dtype=np.int64)}
    check_inputs(right, SPECS, MAX_ROWS)
    wrong: dict[str, Any] = {
        "AUDIO": np.zeros(2, dtype=np.float32),
        "SEED": np.array([1.0], dtype=np.float64),
        "STEPS": np.zeros(9, dtype=np.int32),
    }
    with pytest.raises(InvalidInputError) as caught:
        check_inputs(wrong, SPECS, MAX_ROWS)
    assert {violation.field: violation.description for violation in caught.value.violations} == {
        "prompt": "tensor PROMPT is missing, expected BYTES [n]",
        "audio": "tensor AUDIO has shape [2], expected FP32 [n, samples]",
        "seed": "tensor SEED has datatype float64, expected INT64 [n], or [1] for all",
        "num_inference_steps": (
            "tensor STEPS has 9 rows, expected between 1 and 8; split them into several requests"
        ),
    }


def test_bytes_are_written_as_triton_writes_them() -> None:
    response = pb.ModelInferResponse()
    values = np.array([[b"one"], [b""]], dtype=object)
    spec = TensorSpec(name="DIGEST", field="digest", datatype="BYTES", dims=("n", 1))
    write_outputs(response, {"DIGEST": values}, [spec], {"DIGEST"})
    assert list(response.outputs[0].shape) == [2, 1]
    assert response.raw_output_contents[0] == serialize_byte_tensor(values).item()
