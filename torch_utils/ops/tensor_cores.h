// A warp's products of 16×16 matrices of half types on tensor cores, and copies to shared memory that it does not wait for.

#pragma once

#if defined(__CUDACC_RTC__) && TYPE >= 2 && __CUDA_ARCH__ >= 800

__device__ inline unsigned shared(const void *pointer) { return unsigned(__cvta_generic_to_shared(pointer)); }

// Copies 16 bytes, the last `zeros` of which are zeros.
__device__ inline void copy_async(void *to, const void *from, int zeros) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared(to)), "l"(from), "r"(16 - zeros) : "memory");
}
__device__ inline void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// All groups of copies but the last PRIOR have arrived.
template <int PRIOR>
__device__ void wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PRIOR) : "memory");
}

// The device decides how a matrix is spread over lanes and registers.
#if TYPE == 2
#define KIND "f16"
#define KINDS "f32.f32"
#define LOADED "{%0, %1, %2, %3, %4, %5, %6, %7}, [%8], %9;"
#define FACTORS "{%8, %9, %10, %11, %12, %13, %14, %15}, {%16, %17, %18, %19, %20, %21, %22, %23}"
#define REGISTERS(TO, M) \
    TO(M[0]), TO(M[1]), TO(M[2]), TO(M[3]), TO(M[4]), TO(M[5]), TO(M[6]), TO(M[7])
constexpr int COUNT = 8;
#else
#define KIND "bf16"
#define KINDS "f32.bf16.bf16.f32"
#define LOADED "{%0, %1, %2, %3}, [%4], %5;"
#define FACTORS "{%8, %9, %10, %11}, {%12, %13, %14, %15}"
#define REGISTERS(TO, M) TO(M[0]), TO(M[1]), TO(M[2]), TO(M[3])
constexpr int COUNT = 4;
#endif
#define OUT(X) "=r"(X)
#define IN(X) "r"(X)

struct Left {  // rows of `pitch` elements in shared memory
    unsigned at[COUNT];
    __device__ void load(const T *from, int pitch) {
        asm volatile("wmma.load.a.sync.aligned.row.m16n16k16.shared." KIND " " LOADED
                     : REGISTERS(OUT, at)
                     : "r"(shared(from)), "r"(pitch)
                     : "memory");
    }
};

struct Right {  // columns of `pitch` elements
    unsigned at[COUNT];
    __device__ void load(const T *from, int pitch) {
        asm volatile("wmma.load.b.sync.aligned.col.m16n16k16.shared." KIND " " LOADED
                     : REGISTERS(OUT, at)
                     : "r"(shared(from)), "r"(pitch)
                     : "memory");
    }
};

struct Sum {
    float at[8] = {};
    __device__ void add(const Left &a, const Right &b) {
        asm("wmma.mma.sync.aligned.row.col.m16n16k16." KINDS
                     " {%0, %1, %2, %3, %4, %5, %6, %7}, " FACTORS ", {%0, %1, %2, %3, %4, %5, %6, %7};"
                     : "+f"(at[0]), "+f"(at[1]), "+f"(at[2]), "+f"(at[3]), "+f"(at[4]), "+f"(at[5]), "+f"(at[6]),
                       "+f"(at[7])
                     : REGISTERS(IN, a.at), REGISTERS(IN, b.at));
    }
    __device__ void store(float *to, int pitch) const {  // rows in shared memory
        asm volatile("wmma.store.d.sync.aligned.row.m16n16k16.shared.f32 [%0], {%1, %2, %3, %4, %5, %6, %7, %8}, %9;" ::"r"(
                         shared(to)),
                     "f"(at[0]), "f"(at[1]), "f"(at[2]), "f"(at[3]), "f"(at[4]), "f"(at[5]), "f"(at[6]), "f"(at[7]),
                     "r"(pitch)
                     : "memory");
    }
};
#endif
