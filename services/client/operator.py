"""The rpc of operator.proto: values from messages."""

from milonga.v1 import operator_pb2 as pb
from milonga.v1 import operator_pb2_grpc as rpc
from services.client.answers import ModelSwitch
from services.client.generation import read_model, read_seconds
from services.client.transport import Service, Unary


def read_switch(response: pb.SwitchModelResponse) -> ModelSwitch:
    """Read the answer of SwitchModel."""
    return ModelSwitch(
        previous=read_model(response.previous),
        current=read_model(response.current),
        seconds=read_seconds(response.elapsed),
    )


SERVICE = Service(
    name="generation",
    argument="target",
    stub=rpc.OperatorServiceStub,
    remedy="ask get_model whether the switch, which goes on, has come to its end",
    absent="its operator rpc is off; start it with: milonga serve generation --operator-token-file FILE",
)
SWITCH_MODEL = Unary(service=SERVICE, method=lambda stub: stub.SwitchModel, read=read_switch)
