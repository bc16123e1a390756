"""The row of a method in PEFT's file format.

A method that PEFT has sets ``CODEC`` in its module (the row, or "module:name" where it lies). The row says what
the keys of PEFT's config are and which field of the method each one is; selection of modules, patterns, checks,
keys of tensors and files are common to all rows. The smallest row::

    CODEC = Codec(
        peft_type="VERA", kind="vera", label="VeRA",
        options={
            **LAYERS,                                       # keys that several kinds have: EXCLUDE, LAYERS
            "r": Option(256, "used", "a positive integer", is_rank, field="r"),
            "d_initial": Option(0.1, "ignored", "a number", is_number),
        },
    )

* ``Option.field``: the key is that field of the method, once per adapter; sites that differ cannot be written.
  With ``pattern`` sites may differ: the pattern's key has a field of its own name (LoRA's ``rank_pattern``).
  With ``values`` the config writes the field in other words (``{True: "default", False: "random"}``). The field
  "init" is never in the way: what was initialised is loaded or saved all the same.
* ``parts``: for a config that means several rules (``adaptc.methods.ia3``: feedforward or not).
* ``write``: further keys, from the methods of all sites (``Sites``).
* ``check``: what PEFT itself refuses about combinations of keys.
* ``stored``: the method that a file holds the values of, where that is another one than the one trained.
* ``shared``: tensors that an adapter has once, not at each site (VeRA's projections).
* Tensors of a site: ``Adapter.peft_tensors``, key suffix -> tensor in the shape that PEFT stores. Where the
  parameter has another shape, give a view (``self.ia3_l.detach()[:, None]``): loading writes through it. Where no
  view does, override ``Adapter.set_peft_tensors`` too.
* ``on_model``: the adapter acts on the whole model: its config names no modules, and the suffixes of its tensors are
  their keys.
* A trained bias of the adapted layer has the suffix "bias"; ``method.bias == "all"`` also trains the others.

A method without a row is saved in adaptc's own format: the same files without ``adapter_config.json``.
"""

from adaptc.methods.codec.checks import (
    is_bool,
    is_modules,
    is_names,
    is_number,
    is_probability,
    is_rank,
    is_tokens,
    optional,
    patterns,
)
from adaptc.methods.codec.keys import EXCLUDE, LAYERS, PEFT_VERSION, Option
from adaptc.methods.codec.row import Codec, Config, Part, Shared, codec_of, codecs
from adaptc.methods.codec.sites import Sites

__all__ = [
    "EXCLUDE", "LAYERS", "PEFT_VERSION", "Codec", "Config", "Option", "Part", "Shared", "Sites", "codec_of", "codecs",
    "is_bool", "is_modules", "is_names", "is_number", "is_probability", "is_rank", "is_tokens", "optional", "patterns",
]  # fmt: skip
