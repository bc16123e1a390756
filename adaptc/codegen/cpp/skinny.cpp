// The products with one small side, and DoRA's row norms.
#include "skinny_ops.h"
#include "row_norms.h"
