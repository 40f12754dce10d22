// A CPU stand-in for the CUDA runtime entry points that CuTe DSL's generated host code calls.
//
// Host code loads a fatbin, looks a kernel up by name, and launches it with an array of argument
// addresses. Here "launch" means: find the parameters' sizes in the cubin and hand everything to
// one callback. Everything else answers as a machine with `shim_set_device`'s card would.
#include <elf.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

// One intercepted launch. Pointers are valid during the callback only. Mirrored in host.py.
struct ShimLaunch {
  const char *kernel;
  const void *image;
  uint64_t image_size;
  uint32_t grid[3], block[3], cluster[3], num_params;
  uint64_t dynamic_smem, static_smem;
  void *stream;
  const uint32_t *param_sizes;
  void **args;
  uint32_t num_attrs, pad;
  const void *attrs;  // 72 bytes each: {int id; int pad; 64 bytes of value}
};
typedef int (*ShimCallback)(const ShimLaunch *);

namespace {

struct Library {
  const uint8_t *image;
  size_t size;
};

struct Kernel {
  Library *library;
  std::string name;
  std::vector<uint32_t> param_sizes;
  uint64_t static_smem = 0;
};

struct LaunchAttr {
  int id, pad;
  union {
    uint8_t raw[64];
    uint32_t dim[3];
  } value;
};
static_assert(sizeof(LaunchAttr) == 72, "cudaLaunchAttribute");

struct LaunchConfig {
  uint32_t grid[3], block[3];
  size_t dynamic_smem;
  void *stream;
  LaunchAttr *attrs;
  unsigned num_attrs;
};
static_assert(sizeof(LaunchConfig) == 56, "cudaLaunchConfig_t");

std::recursive_mutex mutex;
ShimCallback callback = nullptr;
int major = 10, minor = 0, num_sms = 148;
std::map<std::pair<Library *, std::string>, Kernel *> kernels;

size_t elf_size(const uint8_t *image) {
  auto *header = (const Elf64_Ehdr *)image;
  size_t end = header->e_shoff + (size_t)header->e_shentsize * header->e_shnum;
  auto *sections = (const Elf64_Shdr *)(image + header->e_shoff);
  for (int i = 0; i < header->e_shnum; i++) {
    size_t stop = sections[i].sh_offset + sections[i].sh_size;
    if (sections[i].sh_type != SHT_NOBITS && stop > end) end = stop;
  }
  size_t programs = header->e_phoff + (size_t)header->e_phentsize * header->e_phnum;
  return programs > end ? programs : end;
}

// The DSL hands over a fatbin: {u32 magic; u16 version; u16 header; u64 payload}, then entries
// {u16 kind; u16 version; u32 header; u64 size; ...}; kind 2 is an ELF, uncompressed in 4.8.1.
Library *make_library(const uint8_t *code) {
  uint32_t magic;
  memcpy(&magic, code, 4);
  if (magic != 0xBA55ED50u) return new Library{code, memcmp(code, ELFMAG, 4) ? 0 : elf_size(code)};
  uint16_t header;
  uint64_t payload;
  memcpy(&header, code + 6, 2);
  memcpy(&payload, code + 8, 8);
  for (const uint8_t *p = code + header, *end = p + payload; p < end;) {
    uint16_t kind;
    uint32_t entry_header;
    uint64_t size;
    memcpy(&kind, p, 2);
    memcpy(&entry_header, p + 4, 4);
    memcpy(&size, p + 8, 8);
    const uint8_t *image = p + entry_header;
    if (kind == 2 && !memcmp(image, ELFMAG, 4)) return new Library{image, elf_size(image)};
    p = image + size;
  }
  fprintf(stderr, "ptx_emulator: the fatbin has no uncompressed ELF entry\n");
  return nullptr;
}

// .nv.info.<kernel> lists each parameter (attribute 0x17): {u32 index; u16 ordinal; u16 offset;
// u32 flags}, its size being flags >> 18. .nv.shared.<kernel> is the static shared memory, in
// which 1 KB that the system reserves is counted too.
void read_elf(Kernel *kernel) {
  const uint8_t *image = kernel->library->image;
  if (kernel->library->size == 0) return;
  auto *header = (const Elf64_Ehdr *)image;
  auto *sections = (const Elf64_Shdr *)(image + header->e_shoff);
  const char *names = (const char *)image + sections[header->e_shstrndx].sh_offset;
  std::string info = ".nv.info." + kernel->name, shared = ".nv.shared." + kernel->name;
  std::map<int, uint32_t> sizes;
  int64_t smem = 0, reserved = 0;
  for (int i = 0; i < header->e_shnum; i++) {
    const char *name = names + sections[i].sh_name;
    if (shared == name) smem += sections[i].sh_size;
    if (!strncmp(name, ".nv.shared.reserved", 19)) reserved = 1024;
    if (info != name) continue;
    const uint8_t *p = image + sections[i].sh_offset, *end = p + sections[i].sh_size;
    while (p + 4 <= end) {
      uint8_t format = p[0], attribute = p[1];
      uint16_t length;
      memcpy(&length, p + 2, 2);
      p += 4;
      if (format != 4) continue;
      if (attribute == 0x17) {
        uint16_t ordinal;
        uint32_t flags;
        memcpy(&ordinal, p + 4, 2);
        memcpy(&flags, p + 8, 4);
        sizes[ordinal] = flags >> 18;
      }
      p += length;
    }
  }
  for (auto &entry : sizes) kernel->param_sizes.push_back(entry.second);
  kernel->static_smem = smem > reserved ? smem - reserved : 0;
}

int device_attribute(int attribute) {
  bool data_centre = major == 9 || major == 10;
  switch (attribute) {
    case 1: case 2: case 3: return 1024;                // threads a block, block x, block y
    case 4: return 64;                                  // block z
    case 5: return 2147483647;                          // grid x
    case 6: case 7: return 65535;                       // grid y, z
    case 8: return 49152;                               // static shared memory a block
    case 10: return 32;                                 // warp size
    case 12: case 82: return 65536;                     // registers a block, an SM
    case 16: return num_sms;
    case 39: return data_centre ? 2048 : 1536;          // threads an SM
    case 75: return major;
    case 76: return minor;
    case 81: return data_centre ? 233472 : 102400;      // shared memory an SM
    case 97: return data_centre ? 232448 : 101376;      // shared memory a block, opted in
    case 106: return 32;                                // blocks an SM
    case 111: return 1024;                              // reserved shared memory a block
    default: return 1;
  }
}

int launch(const LaunchConfig *config, void *function, void **args) {
  std::lock_guard<std::recursive_mutex> guard(mutex);
  auto *kernel = (Kernel *)function;
  ShimLaunch record{};
  record.kernel = kernel->name.c_str();
  record.image = kernel->library->image;
  record.image_size = kernel->library->size;
  memcpy(record.grid, config->grid, 12);
  memcpy(record.block, config->block, 12);
  for (auto &extent : record.cluster) extent = 1;
  for (unsigned i = 0; i < config->num_attrs; i++)
    if (config->attrs[i].id == 4) memcpy(record.cluster, config->attrs[i].value.dim, 12);
  record.num_params = kernel->param_sizes.size();
  record.param_sizes = kernel->param_sizes.data();
  record.dynamic_smem = config->dynamic_smem;
  record.static_smem = kernel->static_smem;
  record.stream = config->stream;
  record.args = args;
  record.num_attrs = config->num_attrs;
  record.attrs = config->attrs;
  return callback ? callback(&record) : 999;
}

}  // namespace

// ---- what the Python side sets ----
EXPORT void shim_set_callback(ShimCallback f) { callback = f; }
EXPORT void shim_set_device(int ma, int mi, int sms) { major = ma; minor = mi; num_sms = sms; }

// ---- libraries and kernels ----
EXPORT int _cudaLibraryLoadData(void **library, const void *code, void *, void **, unsigned, void *,
                                void **, unsigned) {
  *library = make_library((const uint8_t *)code);
  return *library ? 0 : 200;
}
EXPORT int _cudaLibraryUnload(void *) { return 0; }
EXPORT int _cudaLibraryGetKernel(void **kernel, void *library, const char *name) {
  std::lock_guard<std::recursive_mutex> guard(mutex);
  auto *&slot = kernels[{(Library *)library, name}];
  if (!slot) {
    slot = new Kernel{(Library *)library, name, {}, 0};
    read_elf(slot);
  }
  *kernel = slot;
  return 0;
}
EXPORT int _cuKernelGetAttribute(int *value, int attribute, void *kernel, int) {
  *value = attribute == 1 ? (int)((Kernel *)kernel)->static_smem : 0;
  return 0;
}
EXPORT int _cudaKernelSetAttributeForDevice(void *, int, int, int) { return 0; }
EXPORT int _cudaFuncSetAttribute(void *, int, int) { return 0; }

// ---- the device ----
EXPORT int _cudaGetDevice(int *device) { *device = 0; return 0; }
EXPORT int _cudaSetDevice(int) { return 0; }
EXPORT int _cudaGetDeviceCount(int *count) { *count = 1; return 0; }
EXPORT int _cudaDeviceGetAttribute(int *value, int attribute, int) {
  *value = device_attribute(attribute);
  return 0;
}
EXPORT int _cudaDeviceSynchronize() { return 0; }
EXPORT int _cudaGetLastError() { return 0; }

// ---- streams and memory: launches run at once, in order, so a stream is a name only ----
EXPORT int _cudaStreamCreate(void **stream) { *stream = (void *)1; return 0; }
EXPORT int _cudaStreamDestroy(void *) { return 0; }
EXPORT int _cudaStreamSynchronize(void *) { return 0; }
EXPORT int _cudaMalloc(void **p, size_t n) { return posix_memalign(p, 256, n ? n : 1) ? 2 : 0; }
EXPORT int _cudaMallocAsync(void **p, size_t n, void *) { return _cudaMalloc(p, n); }
EXPORT int _cudaFree(void *p) { free(p); return 0; }
EXPORT int _cudaFreeAsync(void *p, void *) { free(p); return 0; }
EXPORT int _cudaMemcpy(void *to, const void *from, size_t n, int) { memcpy(to, from, n); return 0; }
EXPORT int _cudaMemcpyAsync(void *to, const void *from, size_t n, int, void *) {
  memcpy(to, from, n);
  return 0;
}
EXPORT int _cudaMemset(void *p, int value, size_t n) { memset(p, value, n); return 0; }
EXPORT int _cudaMemsetAsync(void *p, int value, size_t n, void *) { memset(p, value, n); return 0; }

// ---- launches ----
EXPORT int _cudaLaunchKernelEx(const LaunchConfig *config, void *kernel, void **args) {
  return launch(config, kernel, args);
}
EXPORT int _cudaLaunchKernel(void *kernel, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                             unsigned by, unsigned bz, void **args, size_t smem, void *stream) {
  LaunchConfig config{{gx, gy, gz}, {bx, by, bz}, smem, stream, nullptr, 0};
  return launch(&config, kernel, args);
}

// ---- the driver's calls, for launchers that come without the DSL ----
struct DriverConfig {
  uint32_t grid[3], block[3], dynamic_smem;
  void *stream;
  LaunchAttr *attrs;
  unsigned num_attrs;
};
static_assert(sizeof(DriverConfig) == 56, "CUlaunchConfig");

EXPORT int cuInit(unsigned) { return 0; }
EXPORT int cuLibraryLoadData(void **library, const void *code, void *a, void **b, unsigned c,
                             void *d, void **e, unsigned f) {
  return _cudaLibraryLoadData(library, code, a, b, c, d, e, f);
}
EXPORT int cuLibraryUnload(void *) { return 0; }
EXPORT int cuLibraryGetKernel(void **kernel, void *library, const char *name) {
  _cudaLibraryGetKernel(kernel, library, name);
  return ((Kernel *)*kernel)->param_sizes.empty() ? 500 : 0;
}
EXPORT int cuKernelGetAttribute(int *value, int attribute, void *kernel, int device) {
  return _cuKernelGetAttribute(value, attribute, kernel, device);
}
EXPORT int cuKernelSetAttribute(int, int, void *, int) { return 0; }
EXPORT int cuDeviceGetAttribute(int *value, int attribute, int device) {
  return _cudaDeviceGetAttribute(value, attribute, device);
}
EXPORT int cuThreadExchangeStreamCaptureMode(int *) { return 0; }
EXPORT int cuGetErrorName(int, const char **name) { *name = "an emulated error"; return 0; }
EXPORT int cuLaunchKernelEx(const DriverConfig *config, void *kernel, void **args, void **) {
  LaunchConfig same{{}, {}, config->dynamic_smem, config->stream, config->attrs,
                    config->num_attrs};
  memcpy(same.grid, config->grid, 12);
  memcpy(same.block, config->block, 12);
  return launch(&same, kernel, args);
}

// ---- helpers of the DSL's runtime library ----
EXPORT int cuda_dialect_init_library_once(void **library, int (*init)(void **),
                                          int (*load_to_device)(void **, int),
                                          void (*set_error)(const char *, const char *)) {
  std::lock_guard<std::recursive_mutex> guard(mutex);
  if (*library) return 0;
  void *loaded = nullptr;
  int error = init(&loaded);
  if (!error && load_to_device) error = load_to_device(&loaded, 0);
  if (error) {
    set_error("CUDADialectError", "CUDA Error Code: the kernel image could not be loaded");
    return -1;
  }
  *library = loaded;
  return 0;
}
EXPORT void cuda_dialect_unload_library_once(void **library) { *library = nullptr; }
EXPORT const char *cuda_dialect_get_error_name(int error) {
  return error ? "cudaErrorUnknown" : "cudaSuccess";
}
EXPORT void cuda_dialect_print_on_error(int error) {
  if (error) fprintf(stderr, "ptx_emulator: CUDA error %d\n", error);
}
EXPORT void cuda_dialect_assert_success(int error) {
  if (error) {
    cuda_dialect_print_on_error(error);
    abort();
  }
}
EXPORT void CuteDSLRT_TVMFFISetRaisedCudaError(void (*set)(const char *, const char **, int),
                                               int error) {
  std::string code = std::to_string(error);
  const char *parts[2] = {"CUDA Error Code: ", code.c_str()};
  if (set) set("CUDADialectError", parts, 2);
}
EXPORT void CuteDSLRT_TVMFFISetRaisedCudaLaunchError(void (*set)(const char *, const char **, int),
                                                     ...) {
  const char *parts[1] = {"the emulated launch failed"};
  if (set) set("CUDADialectError", parts, 1);
}
