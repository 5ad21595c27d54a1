"""What accelerate and diffusers put around the forward of a module: both keep it in an attribute of the module."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch
    from accelerate.hooks import ModelHook
    from diffusers.hooks.hooks import HookRegistry
    from diffusers.hooks.hooks import ModelHook as DiffusersHook

#: accelerate/hooks.py, `add_hook_to_module`: the attribute of its hook.
ACCELERATE = "_hf_hook"
#: diffusers/hooks/hooks.py, `HookRegistry`: the attribute of its registry.
DIFFUSERS = "_diffusers_hook"


class LibraryHooks(NamedTuple):
    """The hooks of other libraries on one module; false if there are none.

    Attributes:
        accelerate: Its hook, such as CPU offloading's; None if there is none.
        diffusers: Its registry of hooks, which stays when the last of them is removed; None if there is none.
    """

    accelerate: ModelHook | None = None
    diffusers: HookRegistry | None = None

    def __bool__(self) -> bool:
        return self.accelerate is not None or self.diffusers is not None

    def named(self, *names: str) -> list[DiffusersHook]:
        """Return the hooks of diffusers that have one of these names ("layerwise_casting", "group_offloading")."""
        hooks = getattr(self.diffusers, "hooks", {})
        return [hooks[name] for name in names if name in hooks]


#: What a module without any has; comparing with it is faster than asking for the truth.
NO_HOOKS = LibraryHooks()


def library_hooks(module: torch.nn.Module) -> LibraryHooks:
    """Return the hooks of accelerate and diffusers on `module` itself, not on its parts."""
    # Not `hasattr`, which takes four times as long on a module; this is asked of each part for every small picture.
    state = vars(module)
    if ACCELERATE in state or DIFFUSERS in state:
        return LibraryHooks(state.get(ACCELERATE), state.get(DIFFUSERS))
    return NO_HOOKS
