"""What a study is: data, clients, model, algorithm, training, augmentation, certification, seed.

A spec is a TOML file. It is checked as a whole before anything is read or written, it can be
written back, and its hash names what was computed. Everything that changes a number stands in it;
everything that does not (folders, device, progress) is an option of the command instead.
"""

from certifl.spec.study import Spec, load, load_stored, merged, received, with_settings

__all__ = ["Spec", "load", "load_stored", "merged", "received", "with_settings"]
