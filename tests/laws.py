"""What tests of single files take from the laws (tersor.testing): weights to try, and comparisons to the last bit."""

from tersor.testing.activations import ACTIVATION_LAWS as ACTIVATION_LAWS
from tersor.testing.activations import kernel_agrees_with_reference as kernel_agrees_with_reference
from tersor.testing.cases import cases_for as cases_for
from tersor.testing.cases import importance as importance
from tersor.testing.cases import inputs as inputs
from tersor.testing.cases import odd_weights as odd_weights
from tersor.testing.cases import random as random
from tersor.testing.cases import stats_for as stats_for
from tersor.testing.cases import weights_for as weights_for
from tersor.testing.cases import widened as widened
from tersor.testing.formats import FORMAT_TABLE_LAWS as FORMAT_TABLE_LAWS
from tersor.testing.formats import check_layout as check_layout
from tersor.testing.formats import laws_of as laws_of
from tersor.testing.formats import params_of as params_of
from tersor.testing.law import check_cases as check_cases
from tersor.testing.law import same_bits as same_bits
from tersor.testing.law import same_parts as same_parts
from tersor.testing.law import share as share
from tersor.testing.methods import METHOD_LAWS as METHOD_LAWS
from tersor.testing.methods import no_worse_than as no_worse_than
from tersor.testing.methods import pairs as pairs
from tersor.testing.methods import refusal_names_what_is_accepted as refusal_names_what_is_accepted
from tersor.testing.methods import scheme_reads_what_it_writes as scheme_reads_what_it_writes
