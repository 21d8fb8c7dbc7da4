#include "../msl/stdlib.h"
