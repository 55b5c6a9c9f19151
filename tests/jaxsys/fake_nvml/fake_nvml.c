/* A libnvidia-ml.so.1 with one GPU whose state lies in a shared file (FAKE_NVML_STATE), so that a
   test and the processes it starts and kills see the same driver, and faults can be injected. */
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

typedef struct {
  int init_error, set_error, read_error, energy_error, mig, vgpu, no_clocks, legacy;
  int set_delay_us, clamp_mhz;
  unsigned locked_mhz, sets, resets, power_mw;
  unsigned long long reasons, energy_mj, energy_step_ms, energy_modulus_mj;
} State;

static State *state;
enum { OK = 0, INVALID = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, SMALL = 7, UNKNOWN_FUNCTION = 13 };
static const char *UUID = "GPU-fake-0001";

static int loaded(void) {
  if (state) return OK;
  const char *path = getenv("FAKE_NVML_STATE");
  int file = path ? open(path, O_RDWR) : -1;
  if (file < 0) return 9;
  state = mmap(0, sizeof(State), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  if (state == MAP_FAILED) { state = 0; return 9; }
  return OK;
}
int fake_attach(void) { return loaded(); }
int nvmlInitWithFlags(unsigned flags) { int e = loaded(); return e ? e : state->init_error; }
int nvmlShutdown(void) { return OK; }
const char *nvmlErrorString(int code) { return code == 4 ? "Insufficient Permissions" : code == 15 ? "GPU is lost" : "Error"; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 1; return OK; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
  *device = state; return index == 0 ? OK : INVALID;
}
int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
  *device = state; return strcmp(uuid, UUID) ? NOT_FOUND : OK;
}
int nvmlDeviceGetName(void *d, char *name, unsigned n) { strncpy(name, "Fake H100", n); return OK; }
int nvmlDeviceGetUUID(void *d, char *uuid, unsigned n) { strncpy(uuid, UUID, n); return OK; }
int nvmlDeviceGetSupportedMemoryClocks(void *d, unsigned *count, unsigned *clocks) {
  if (state->no_clocks) return NOT_SUPPORTED;
  if (!clocks || *count < 2) { *count = 2; return SMALL; }
  clocks[0] = 2619; clocks[1] = 1593; *count = 2; return OK;
}
int nvmlDeviceGetSupportedGraphicsClocks(void *d, unsigned memory, unsigned *count, unsigned *clocks) {
  unsigned n = (1980 - 345) / 15 + 1;
  if (memory != 2619) return INVALID;
  if (!clocks || *count < n) { *count = n; return SMALL; }
  for (unsigned i = 0; i < n; i++) clocks[i] = 1980 - 15 * i;
  *count = n; return OK;
}
int nvmlDeviceGetMigMode(void *d, unsigned *now, unsigned *pending) { *now = *pending = state->mig; return OK; }
int nvmlDeviceGetVirtualizationMode(void *d, int *mode) { *mode = state->vgpu ? 2 : 0; return OK; }
int nvmlDeviceSetGpuLockedClocks(void *d, unsigned low, unsigned high) {
  if (state->set_error) return state->set_error;
  usleep(state->set_delay_us);
  state->locked_mhz = high; state->sets++; return OK;
}
int nvmlDeviceResetGpuLockedClocks(void *d) {
  if (state->set_error) return state->set_error;
  usleep(state->set_delay_us);
  state->locked_mhz = 0; state->resets++; return OK;
}
int nvmlDeviceGetClockInfo(void *d, int type, unsigned *mhz) {
  if (state->read_error) return state->read_error;
  *mhz = state->locked_mhz ? state->locked_mhz : 1980;
  if (state->clamp_mhz && *mhz > (unsigned)state->clamp_mhz) *mhz = state->clamp_mhz;
  return OK;
}
int nvmlDeviceGetPowerUsage(void *d, unsigned *mw) { *mw = state->power_mw; return state->read_error; }
int nvmlDeviceGetEnforcedPowerLimit(void *d, unsigned *mw) { *mw = 700000; return OK; }
int nvmlDeviceGetTotalEnergyConsumption(void *d, unsigned long long *mj) {
  if (state->energy_error) return state->energy_error;
  if (state->read_error) return state->read_error;
  unsigned long long total = state->energy_mj;
  if (state->energy_step_ms) { /* moves on only every step, as the real counter does */
    struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t);
    unsigned long long ms = t.tv_sec * 1000ULL + t.tv_nsec / 1000000;
    total += ms / state->energy_step_ms * state->energy_step_ms * state->power_mw / 1000;
  }
  *mj = state->energy_modulus_mj ? total % state->energy_modulus_mj : total;
  return OK;
}
int nvmlDeviceGetCurrentClocksEventReasons(void *d, unsigned long long *bits) {
  *bits = state->reasons; return state->legacy ? UNKNOWN_FUNCTION : state->read_error;
}
int nvmlDeviceGetCurrentClocksThrottleReasons(void *d, unsigned long long *bits) {
  *bits = state->reasons; return state->read_error;
}
