"""What a model may say of its arrays and parts; a strategy may carry it out on its own."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

if TYPE_CHECKING:
    from .._constrain import constrain as constrain
    from .._remat import remat as remat
    from .._shards import shard_max as pmax  # noqa: F401
    from .._shards import shard_start as shard_offset  # noqa: F401
    from .._shards import shard_sum as psum  # noqa: F401
    from .._staged import staged as layer_stack  # noqa: F401
    from .._weight import weight as use_param  # noqa: F401
    from ..models import attention as attention
    from ..models import experts as experts
    from ..models import route as route
else:
    __getattr__, __dir__, __all__ = lazy_names(
        __name__,
        {
            "attention": "..models",
            "constrain": ".._constrain",
            "experts": "..models",
            "layer_stack": ".._staged:staged",
            "pmax": ".._shards:shard_max",
            "psum": ".._shards:shard_sum",
            "remat": ".._remat",
            "route": "..models",
            "shard_offset": ".._shards:shard_start",
            "use_param": ".._weight:weight",
        },
    )
