// What the kernels use of OpenMP's header, which zig does not bring.
#pragma once

extern "C" {
double omp_get_wtime();
int omp_get_thread_num();
}
