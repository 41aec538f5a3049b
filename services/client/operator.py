"""The rpc of operator.proto: values from messages."""

from milonga.v1 import operator_pb2 as pb
from milonga.v1 import operator_pb2_grpc as rpc
from services.api.model import ModelSwitch
from services.client.transport import Service, Unary
from services.wire import read_duration, read_version


def read_switch(response: pb.SwitchModelResponse) -> ModelSwitch:
    """Read the answer of SwitchModel."""
    return ModelSwitch(
        previous=read_version(response.previous),
        current=read_version(response.current),
        seconds=read_duration(response.elapsed),
    )


SERVICE = Service(
    name="generation",
    argument="target",
    stub=rpc.OperatorServiceStub,
    remedy="ask get_model what is served: the switch was abandoned, unless it had just ended",
    absent="its operator rpc is off; start it with: milonga serve generation --operator-token-file FILE",
)
SWITCH_MODEL = Unary(service=SERVICE, method=lambda stub: stub.SwitchModel, read=read_switch)
