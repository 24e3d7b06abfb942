"""What a model may say of its arrays and parts; a strategy may carry it out in its own way."""

from typing import TYPE_CHECKING

from .._core.lazy import lazy_names

if TYPE_CHECKING:
    from ._attention import attention as attention
    from ._constrain import constrain as constrain
    from ._experts import experts as experts
    from ._experts import route as route
    from ._layer_stack import staged as layer_stack  # noqa: F401
    from ._manual_axis_rules import shard_max as pmax  # noqa: F401
    from ._manual_axis_rules import shard_start as shard_offset  # noqa: F401
    from ._manual_axis_rules import shard_sum as psum  # noqa: F401
    from ._overridable import region as overridable  # noqa: F401
    from ._remat import remat as remat
    from ._use_param import weight as use_param  # noqa: F401
else:
    __getattr__, __dir__, __all__ = lazy_names(
        __name__,
        {
            "attention": "._attention",
            "constrain": "._constrain",
            "experts": "._experts",
            "layer_stack": "._layer_stack:staged",
            "overridable": "._overridable:region",
            "pmax": "._manual_axis_rules:shard_max",
            "psum": "._manual_axis_rules:shard_sum",
            "remat": "._remat",
            "route": "._experts",
            "shard_offset": "._manual_axis_rules:shard_start",
            "use_param": "._use_param:weight",
        },
    )
