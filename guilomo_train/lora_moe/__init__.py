"""LoRA-MoE as a PEFT method.

Importing this package registers the type "GUILOMO", after which `get_peft_model`,
`PeftModel.from_pretrained` and TRL's trainers take a `LoraMoeConfig` like any other.

    config.py   LoraMoeConfig, what `adapter_config.json` holds
    layer.py    the layer: a frozen linear layer and its experts in fused form
    routing.py  weights of its experts, and what they would be with one more or less
    model.py    which layers of a model are adapted, and how
"""

from peft.utils import PeftType, register_peft_method

from guilomo_serve.adapter import PEFT_TYPE


def _add_peft_type(name: str) -> None:
    """PEFT's types are an enum without an extension point, so the member is made by hand."""
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)
    type.__setattr__(PeftType, name, member)


if PEFT_TYPE not in PeftType.__members__:
    _add_peft_type(PEFT_TYPE)

from guilomo_train.lora_moe.config import LoraMoeConfig  # noqa: E402  (needs the type above)
from guilomo_train.lora_moe.layer import LoraMoeLayer, LoraMoeLinear  # noqa: E402
from guilomo_train.lora_moe.model import LoraMoeModel  # noqa: E402

register_peft_method(
    name=PEFT_TYPE.lower(),
    config_cls=LoraMoeConfig,
    model_cls=LoraMoeModel,
    prefix=LoraMoeModel.prefix,
)

__all__ = ["LoraMoeConfig", "LoraMoeLayer", "LoraMoeLinear", "LoraMoeModel"]
