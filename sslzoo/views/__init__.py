"""Views: what a recipe says (spec), stateless random numbers (draw), the compiled pass and its callers (kernel,
executor), transforms from elsewhere (foreign)."""

from sslzoo.views.draw import integers, permutation, table
from sslzoo.views.executor import Clean, Views, warm
from sslzoo.views.foreign import FromTransform
from sslzoo.views.spec import Blur, Jitter, Solarize, View, parse

__all__ = [
    "Blur",
    "Clean",
    "FromTransform",
    "Jitter",
    "Solarize",
    "View",
    "Views",
    "integers",
    "parse",
    "permutation",
    "table",
    "warm",
]
