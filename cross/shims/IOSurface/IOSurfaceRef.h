// The handle that metal-cpp's signatures pass on; nobody looks inside.
#pragma once
typedef struct __IOSurface* IOSurfaceRef;
