// The Metal standard library, as far as our kernels and MLX's use it, for "C++ for OpenCL 2021".
//
// Every <metal_*> header forwards here. The functions are nodebug: their code carries the line of
// the kernel that calls them, so a report names a .metal line, never one of these headers.
#pragma once
#include "types.h"

#include "traits.h"

#include "convert.h"

#include "limits.h"

#include "math.h"

#include "integer.h"

#include "sync.h"

#include "simd.h"

#include "matrix.h"

#include "atomic.h"

#include "apple_builtins.h"

#include "constructors.h"
