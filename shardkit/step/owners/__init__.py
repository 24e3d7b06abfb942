"""Owners: an optimizer's matrices are divided over the devices that their dims are split over."""

from ._update import update_by_owners

__all__ = ["update_by_owners"]
