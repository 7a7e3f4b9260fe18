"""The tiny study with perturbations of their own: client 1 pixel noise, client 2 none."""

import tiny_study as tiny
from certifl.spec import Spec, with_settings

PIXEL = {"family": "pixel", "sigma": 0.12}
OWN = [{"clients": [1], "perturbation": PIXEL}, {"clients": [2], "perturbation": "none"}]
AS_CERTIFIED = {"federated": "own"}


def spec(own: object = OWN, *settings: str, **sections: object) -> Spec:
    certification = {**tiny.VALUES["certification"], "own": own}
    values = {**tiny.VALUES, "certification": certification, "clients": {"count": 3}}
    return with_settings({**values, "augmentation": AS_CERTIFIED, **sections}, settings)
