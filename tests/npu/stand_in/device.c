/*
 * A device in host memory: the part of the stand-in for CANN that has behaviour. Everything else that torch_npu asks CANN for is a
 * generated function that returns 0 (see build.py).
 *
 * Memory is memory of the process, so copies are real. Kernels do nothing: what they would have written is left as it was.
 * Streams, events, captured graphs and communicators are small structs that remember what a test may ask about.
 *
 * The signatures are those of the headers in torch_npu/include/third_party/acl/inc and hccl/inc, with enums as int; the headers
 * themselves are C++.
 */
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SUCCESS 0
#define ERROR_INVALID_PARAM 107000             /* ACL_ERROR_RT_PARAM_INVALID */
#define ERROR_STREAM_UNJOINED 107025           /* ACL_ERROR_RT_STREAM_UNJOINED */
#define ERROR_STREAM_CAPTURED 107027           /* ACL_ERROR_RT_STREAM_CAPTURED */
#define ERROR_STREAM_NOT_CAPTURED 107029       /* ACL_ERROR_RT_STREAM_NOT_CAPTURED */
#define ERROR_CAPTURE_MODE_NOT_SUPPORT 107030  /* ACL_ERROR_RT_CAPTURE_MODE_NOT_SUPPORT */
#define ERROR_OUT_OF_MEMORY 207001             /* ACL_ERROR_RT_MEMORY_ALLOCATION */
#define ERROR_NOT_SUPPORTED 207000             /* ACL_ERROR_RT_FEATURE_NOT_SUPPORT */

enum { CAPTURE_MODE_GLOBAL = 0, CAPTURE_MODE_THREAD_LOCAL = 1, CAPTURE_MODE_RELAXED = 2 };
enum { ALIGNMENT = 512, VERSION_BYTES = 128, ROOT_INFO_BYTES = 4108, COMM_NAME_BYTES = 128 };

static const char CANN_VERSION[] = "9.0.0";
static const size_t MEMORY_BYTES = (size_t)8 << 30;
static const int64_t NUM_CORES = 24;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* ---- What a test may ask: how often, and which kernels and collectives were launched. ---- */

static uint32_t num_captures, num_replays, num_refusals;

static const char **launches;
static size_t num_launches, launches_capacity;

uint32_t stand_in_captures(void) { return num_captures; }
uint32_t stand_in_replays(void) { return num_replays; }
uint32_t stand_in_refusals(void) { return num_refusals; }
size_t stand_in_num_launches(void) { return num_launches; }
const char *stand_in_launch(size_t index) { return index < num_launches ? launches[index] : NULL; }

/* Called by the generated functions. torch_npu launches kernels from a thread of its own. */
long stand_in_launched(const char *name)
{
    pthread_mutex_lock(&lock);
    if (num_launches == launches_capacity) {
        launches_capacity = launches_capacity ? 2 * launches_capacity : 1024;
        launches = realloc(launches, launches_capacity * sizeof *launches);
    }
    launches[num_launches++] = name;
    pthread_mutex_unlock(&lock);
    return SUCCESS;
}

/* ---- The device ---- */

static __thread int current_device;
static char context[64];

int aclrtGetDeviceCount(uint32_t *count)
{
    *count = 1;
    return SUCCESS;
}

int aclrtSetDevice(int32_t device)
{
    current_device = device;
    return SUCCESS;
}

int aclrtGetDevice(int32_t *device)
{
    *device = current_device;
    return SUCCESS;
}

const char *aclrtGetSocName(void)
{
    const char *name = getenv("CANN_STAND_IN_SOC");
    return name ? name : "Ascend910_9391";
}

int aclrtGetCurrentContext(void **result)
{
    *result = context;
    return SUCCESS;
}

int aclrtGetPrimaryCtxState(int32_t device, uint32_t *flags, int32_t *active)
{
    *active = 1;
    return SUCCESS;
}

int aclrtGetDeviceInfo(uint32_t device, int attribute, int64_t *value)
{
    *value = NUM_CORES;
    return SUCCESS;
}

int aclrtGetMemInfo(int attribute, size_t *free_bytes, size_t *total_bytes)
{
    *free_bytes = *total_bytes = MEMORY_BYTES;
    return SUCCESS;
}

int aclrtDeviceGetBareTgid(int32_t *pid)
{
    *pid = 1;
    return SUCCESS;
}

int aclsysGetVersionStr(char *package, char *version)
{
    strcpy(version, CANN_VERSION);
    return SUCCESS;
}

int aclsysGetCANNVersion(int package, void *version)
{
    memset(version, 0, VERSION_BYTES); /* aclCANNPackageVersion begins with the text */
    strcpy(version, CANN_VERSION);
    return SUCCESS;
}

const char *aclGetRecentErrMsg(void) { return ""; }

size_t aclGetCompileoptSize(int option) { return sizeof "disable"; }

int aclGetCompileopt(int option, char *value, size_t length)
{
    snprintf(value, length, "disable");
    return SUCCESS;
}

/* ge::OperatorFactory::IsExistOp: every operator exists, so that converters that ask take the path of a new CANN. */
bool stand_in_operator_exists(const char *type) __asm__("_ZN2ge15OperatorFactory9IsExistOpEPKc");
bool stand_in_operator_exists(const char *type) { return true; }

/* ---- Streams and events ---- */

struct stream {
    int32_t id;
    bool captured;
    bool unjoined; /* entered the capture through an event, and no other stream of the capture waited for it since */
    struct stream *next;
};

struct event {
    struct stream *captured_in; /* the stream that recorded it, if that was being captured */
};

static struct stream *streams;

int aclrtCreateStreamWithConfig(void **result, uint32_t priority, uint32_t flags)
{
    static int32_t last_id;
    struct stream *stream = calloc(1, sizeof *stream);
    pthread_mutex_lock(&lock);
    stream->id = ++last_id;
    stream->next = streams;
    streams = stream;
    pthread_mutex_unlock(&lock);
    *result = stream;
    return SUCCESS;
}

int aclrtCreateStream(void **result) { return aclrtCreateStreamWithConfig(result, 0, 0); }

int aclrtStreamGetId(void *stream, int32_t *id)
{
    *id = stream ? ((struct stream *)stream)->id : 0;
    return SUCCESS;
}

int aclrtStreamQuery(void *stream, int *status)
{
    *status = 0; /* ACL_STREAM_STATUS_COMPLETE */
    return SUCCESS;
}

int aclrtCreateEventExWithFlag(void **result, uint32_t flags)
{
    *result = calloc(1, sizeof(struct event));
    return SUCCESS;
}

int aclrtCreateEventWithFlag(void **result, uint32_t flags) { return aclrtCreateEventExWithFlag(result, flags); }

int aclrtDestroyEvent(void *event)
{
    free(event);
    return SUCCESS;
}

int aclrtRecordEvent(void *event, void *stream)
{
    struct stream *recorded_in = stream;
    if (event)
        ((struct event *)event)->captured_in = recorded_in && recorded_in->captured ? recorded_in : NULL;
    return SUCCESS;
}

/* A stream that waits for an event of a captured stream joins the capture; the stream that is waited for is joined again. */
int aclrtStreamWaitEvent(void *stream, void *event)
{
    struct stream *waiting = stream;
    struct stream *waited_for = event ? ((struct event *)event)->captured_in : NULL;
    if (!waiting || !waited_for || !waited_for->captured || waiting == waited_for)
        return SUCCESS;
    if (!waiting->captured)
        waiting->captured = waiting->unjoined = true;
    waited_for->unjoined = false;
    return SUCCESS;
}

int aclrtQueryEventStatus(void *event, int *status)
{
    *status = 1; /* ACL_EVENT_RECORDED_STATUS_COMPLETE */
    return SUCCESS;
}

int aclrtQueryEventRecordedStatus(void *event, int *status) { return aclrtQueryEventStatus(event, status); }
int aclQueryEventRecordedStatus(void *event, int *status) { return aclrtQueryEventStatus(event, status); }
int aclrtQueryEventWaitStatus(void *event, int *status) { return aclrtQueryEventStatus(event, status); }
int aclQueryEventWaitStatus(void *event, int *status) { return aclrtQueryEventStatus(event, status); }

int aclrtEventElapsedTime(float *milliseconds, void *start, void *end)
{
    *milliseconds = 0;
    return SUCCESS;
}

/* ---- Captured graphs ---- */

struct graph {
    uint32_t id;
    uint32_t replays;
};

static struct {
    struct stream *origin; /* NULL when nothing is captured */
    struct graph *graph;
    int mode;
    pthread_t thread;
} capture;

/* Whether this thread must not wait for the device now. In relaxed mode CANN allows more than this does. */
static bool waiting_is_refused(void)
{
    if (!capture.origin)
        return false;
    if (capture.mode != CAPTURE_MODE_GLOBAL && !pthread_equal(capture.thread, pthread_self()))
        return false;
    ++num_refusals;
    return true;
}

int aclmdlRICaptureBegin(void *stream, int mode)
{
    static uint32_t last_id;
    if (!stream)
        return ERROR_INVALID_PARAM;
    if (capture.origin)
        return ERROR_STREAM_CAPTURED;
    capture.origin = stream;
    capture.origin->captured = true;
    capture.graph = calloc(1, sizeof *capture.graph);
    capture.graph->id = ++last_id;
    capture.mode = mode;
    capture.thread = pthread_self();
    return SUCCESS;
}

int aclmdlRICaptureGetInfo(void *stream, int *status, void **graph)
{
    bool captured = stream && ((struct stream *)stream)->captured;
    *status = captured; /* ACL_MODEL_RI_CAPTURE_STATUS_ACTIVE is 1 */
    if (graph)
        *graph = captured ? capture.graph : NULL;
    return SUCCESS;
}

int aclmdlRICaptureEnd(void *stream, void **graph)
{
    bool unjoined = false;
    if (!capture.origin || capture.origin != stream)
        return ERROR_STREAM_NOT_CAPTURED;
    for (struct stream *each = streams; each; each = each->next) {
        unjoined |= each->unjoined;
        each->captured = each->unjoined = false;
    }
    capture.origin = NULL;
    *graph = capture.graph;
    if (unjoined)
        return ERROR_STREAM_UNJOINED;
    ++num_captures;
    return SUCCESS;
}

int aclmdlRIExecuteAsync(void *graph, void *stream)
{
    if (!graph)
        return ERROR_INVALID_PARAM;
    ++((struct graph *)graph)->replays;
    ++num_replays;
    return SUCCESS;
}

int aclmdlRIGetId(void *graph, uint32_t *id)
{
    *id = ((struct graph *)graph)->id;
    return SUCCESS;
}

int aclmdlRIDestroy(void *graph)
{
    free(graph);
    return SUCCESS;
}

int aclmdlRICaptureTaskGrpEnd(void *stream, void **handle)
{
    static char task_group[8];
    *handle = task_group;
    return SUCCESS;
}

/* ---- Memory ---- */

int aclrtMalloc(void **result, size_t bytes, int policy)
{
    return posix_memalign(result, ALIGNMENT, bytes ? bytes : ALIGNMENT) ? ERROR_OUT_OF_MEMORY : SUCCESS;
}

int aclrtMallocAlign32(void **result, size_t bytes, int policy) { return aclrtMalloc(result, bytes, policy); }
int aclrtMallocHost(void **result, size_t bytes) { return aclrtMalloc(result, bytes, 0); }
int aclrtMallocHostWithCfg(void **result, uint64_t bytes, void *config) { return aclrtMalloc(result, bytes, 0); }

int aclrtFree(void *memory)
{
    free(memory);
    return SUCCESS;
}

int aclrtFreeHost(void *memory) { return aclrtFree(memory); }

/* Not refused in a capture, even of host memory that is not pinned, which CANN has an error for (107041): torch_npu copies from a
 * thread of its own, and an error there is the end of all its calls in the process. */
int aclrtMemcpyAsync(void *target, size_t capacity, const void *source, size_t bytes, int kind, void *stream)
{
    memmove(target, source, bytes);
    return SUCCESS;
}

int aclrtMemsetAsync(void *target, size_t capacity, int32_t value, size_t bytes, void *stream)
{
    memset(target, value, bytes);
    return SUCCESS;
}

/* ---- What waits for the device, and so may not happen while it captures ---- */

static int wait_for_device(void) { return waiting_is_refused() ? ERROR_CAPTURE_MODE_NOT_SUPPORT : SUCCESS; }

int aclrtSynchronizeStream(void *stream) { return wait_for_device(); }
int aclrtSynchronizeStreamWithTimeout(void *stream, int32_t timeout) { return wait_for_device(); }
int aclrtSynchronizeDevice(void) { return wait_for_device(); }
int aclrtSynchronizeDeviceWithTimeout(int32_t timeout) { return wait_for_device(); }
int aclrtSynchronizeEvent(void *event) { return wait_for_device(); }

int aclrtMemcpy(void *target, size_t capacity, const void *source, size_t bytes, int kind)
{
    int error = wait_for_device();
    return error ? error : aclrtMemcpyAsync(target, capacity, source, bytes, kind, NULL);
}

int aclrtMemset(void *target, size_t capacity, int32_t value, size_t bytes)
{
    int error = wait_for_device();
    return error ? error : aclrtMemsetAsync(target, capacity, value, bytes, NULL);
}

/* ---- What kernels are launched with. Nobody reads it, so one object serves all. ---- */

static char argument[64];

void *aclCreateTensor(void) { return argument; }
void *aclCreateScalar(void) { return argument; }
void *aclCreateIntArray(void) { return argument; }
void *aclCreateBoolArray(void) { return argument; }
void *aclCreateFloatArray(void) { return argument; }
void *aclCreateTensorList(void) { return argument; }
void *aclCreateScalarList(void) { return argument; }

/* The shape of a result that depends on values (nonzero, masked_select): nothing computed it. */
int aclGetViewShape(const void *tensor, int64_t **sizes, uint64_t *num_sizes) { return ERROR_NOT_SUPPORTED; }

/* ---- Communicators: each has a name of its own. They send nothing. ---- */

struct communicator {
    char name[COMM_NAME_BYTES];
};

int HcclGetRootInfo(void *root_info)
{
    memset(root_info, 1, ROOT_INFO_BYTES);
    return SUCCESS;
}

int HcclCommInitRootInfo(uint32_t num_ranks, const void *root_info, uint32_t rank, void **result)
{
    static uint32_t last_id;
    struct communicator *created = calloc(1, sizeof *created);
    pthread_mutex_lock(&lock);
    snprintf(created->name, sizeof created->name, "stand_in_%u_rank_%u_of_%u", ++last_id, rank, num_ranks);
    pthread_mutex_unlock(&lock);
    *result = created;
    return SUCCESS;
}

int HcclCommInitRootInfoConfig(uint32_t num_ranks, const void *root_info, uint32_t rank, const void *config, void **result)
{
    return HcclCommInitRootInfo(num_ranks, root_info, rank, result);
}

int HcclCreateSubCommConfig(void **parent, uint32_t num_ranks, uint32_t *ranks, uint64_t id, uint32_t rank, void *config,
                            void **result)
{
    return HcclCommInitRootInfo(num_ranks, NULL, rank, result);
}

int HcclCommDestroy(void *communicator)
{
    free(communicator);
    return SUCCESS;
}

int HcclGetCommName(void *communicator, char *name)
{
    strcpy(name, ((struct communicator *)communicator)->name);
    return SUCCESS;
}

int HcclGetCommAsyncError(void *communicator, int *error)
{
    *error = SUCCESS;
    return SUCCESS;
}

uint32_t HcclGetCommConfigCapability(void) { return 0; }
