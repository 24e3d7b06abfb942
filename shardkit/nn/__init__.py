"""`sk.nn`: what a model can state about its arrays and its parts, for strategies to act on."""

from typing import TYPE_CHECKING

from .._core.startup import lazy_names

if TYPE_CHECKING:
    from ._attention import attention as attention
    from ._constrain import constrain as constrain
    from ._experts import experts as experts
    from ._experts import route as route
    from ._layer_stack import layer_stack as layer_stack
    from ._manual_axis_rules import pmax as pmax
    from ._manual_axis_rules import psum as psum
    from ._manual_axis_rules import shard_offset as shard_offset
    from ._overridable import overridable as overridable
    from ._remat import remat as remat
    from ._use_param import use_param as use_param
else:
    __getattr__, __dir__, __all__ = lazy_names(
        __name__,
        {
            "attention": "._attention",
            "constrain": "._constrain",
            "experts": "._experts",
            "layer_stack": "._layer_stack",
            "overridable": "._overridable",
            "pmax": "._manual_axis_rules",
            "psum": "._manual_axis_rules",
            "remat": "._remat",
            "route": "._experts",
            "shard_offset": "._manual_axis_rules",
            "use_param": "._use_param",
        },
    )
