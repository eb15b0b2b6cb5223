"""Makes FLYLORA, and the baselines' names, PEFT types: the only file that touches PEFT's registries.

PEFT (0.21) has no plug-in mechanism: `register_peft_method` accepts only members of the enum `PeftType`, and saving and
loading dispatch through the dictionaries it fills. So a real member is added first, then PEFT's own function is called.
"""

from __future__ import annotations

from typing import Any

from peft.utils.peft_types import PeftType, register_peft_method

NAME = "flylora"
PREFIX = "flylora_"


def peft_type(name: str) -> Any:
    """The member of PeftType for a method's name in lower case, made on the first call and reused ever after."""
    member_name = name.upper()
    if member_name in PeftType.__members__:
        return PeftType[member_name]
    member = str.__new__(PeftType, member_name)
    member._name_ = member_name
    member._value_ = member_name
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    member._sort_order_ = len(PeftType.__members__)  # type: ignore[attr-defined]
    PeftType._member_names_.append(member_name)
    PeftType._member_map_[member_name] = member
    PeftType._value2member_map_[member_name] = member
    # From Python 3.12 on members are found as class attributes, which EnumMeta.__setattr__ would refuse to set.
    type.__setattr__(PeftType, member_name, member)
    return member


FLYLORA = peft_type(NAME)


def register(config_class: type, model_class: type, name: str = NAME) -> None:
    """Register the two classes with PEFT under a name; a second call with the same classes does nothing.

    Raises:
        RuntimeError: when another library owns the name.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    kind = peft_type(name)
    owner = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind)
    if owner is config_class and PEFT_TYPE_TO_TUNER_MAPPING.get(kind) is model_class:
        return
    if owner is not None:
        raise RuntimeError(
            f"The PEFT type {kind.value} belongs to {owner.__module__}.{owner.__qualname__}: only one library can "
            "register it, so do not import both in one process."
        )
    # transformers rebuilds the prefix from the type's value: no other would be found.
    register_peft_method(name=name, config_cls=config_class, model_cls=model_class, prefix=f"{name}_")
