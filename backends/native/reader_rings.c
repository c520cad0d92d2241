/* See reader_rings.h. The protocol is that of fuse-io-uring.rst in the kernel's documentation; a ring is used by its thread
 * alone (SINGLE_ISSUER), and the kernel writes into its entries only while that thread is in io_uring_enter
 * (DEFER_TASKRUN). */
#include "reader_rings.h"

#include "reader_eager.h"
#include "reader_waiting.h"
#include "tm.h"

#include <errno.h>
#include <linux/fuse.h>
#include <linux/io_uring.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#ifndef IORING_SETUP_NO_MMAP /* Linux 6.5 */
#define IORING_SETUP_NO_MMAP (1U << 14)
#endif
#ifndef MADV_DONTNEED_LOCKED /* Linux 5.18 */
#define MADV_DONTNEED_LOCKED 24
#endif

enum {
    ENTRIES = 32,           /* of a queue; twice what keeps any disk busy, so that hits get through */
    MOST_RINGS = 4096,
    SPARE = 2 * TM_PAGE,    /* a hit that starts within a page is decompressed from that page's start */
    KEPT_BYTES = 64 << 10,  /* of an entry's memory; more is given back when nothing comes for a while */
    WHILE_S = 1,
    TOGETHER = 4,           /* answers that are committed together at most: the first wakes a CPU, the others find it awake */
    SMALL_BYTES = 16 << 10, /* of an answer that may wait for others */
    STAY_EVERY = 256,       /* turns */
    SUBMISSIONS = 2 * ENTRIES, /* a power of two; an entry has one at a time, and the bell */
    QUEUES_BYTES = 4 * TM_PAGE,
    NO_QUEUE = 0xffff,
    URING_REGISTER = 1,     /* FUSE_IO_URING_CMD_REGISTER of linux/fuse.h 7.42 (Linux 6.14); Debian 12's is older */
    URING_COMMIT = 2,       /* FUSE_IO_URING_CMD_COMMIT_AND_FETCH */
};

/* struct fuse_uring_req_header */
struct entry_header {
    union {
        struct fuse_in_header in;
        struct fuse_out_header out;
        uint8_t room[128];
    } head;
    uint8_t argument[128];   /* of fixed size: what the operation's struct is */
    uint64_t flags;
    uint64_t commit_id;      /* how a commit names the request */
    uint32_t payload_bytes;  /* of the request, or of the answer */
    uint32_t padding;
    uint64_t reserved;
};
_Static_assert(sizeof(struct entry_header) == 288, "as the kernel has it");

/* struct fuse_uring_cmd_req, at the end of a submission */
struct entry_command {
    uint64_t flags, commit_id;
    uint16_t queue;
    uint8_t padding[6];
};

struct submission { /* of a ring with SQE128 */
    union {
        struct io_uring_sqe sqe;
        struct {
            uint8_t before[offsetof(struct io_uring_sqe, cmd)];
            struct entry_command command;
        };
        uint8_t room[128];
    };
};
_Static_assert(sizeof(struct submission) == 128 && offsetof(struct io_uring_sqe, cmd) == 48, "SQE128");

struct ring;
struct entry {
    struct ring *ring;
    struct entry *next;          /* in `answered` */
    struct entry_header *header; /* this and the payload are the kernel's until it brings a request */
    uint8_t *payload;
    bool busy;                   /* it has a request */
    bool large;                  /* more than KEPT_BYTES of its memory may be there */
    struct iovec parts[2];       /* both, for registering */
};

struct ring {
    struct rings *all;
    unsigned queue; /* of the kernel, which is a CPU's */
    int fd;
    int bell;       /* an eventfd: somebody else has answered, or the ring is to end */
    uint64_t rung;  /* what is read from it */
    bool listens;   /* that read is under way */
    bool runs;      /* it has a thread */
    bool large;     /* entries are, that had a request */
    unsigned waits; /* answers that wait to be committed, of this turn */
    struct eager eager_here, eager_elsewhere, *eager; /* by who has answered last, and that one */
    _Atomic int error; /* why an entry was refused or lost, 0: none was */
    pthread_t thread;

    uint8_t *queues; /* the memory of both queues of io_uring, whose parts follow */
    size_t queues_bytes;
    _Atomic uint32_t *submit_head, *submit_tail, *submit_flags, *complete_head, *complete_tail;
    uint32_t submit_mask, complete_mask;
    const struct io_uring_cqe *completions;
    struct submission *submissions;
    size_t submissions_bytes;

    uint8_t *memory; /* of all entries */
    size_t memory_bytes;
    pthread_mutex_t lock;
    struct entry *answered; /* by other threads, to be committed */
    struct entry entries[ENTRIES];
};

struct rings {
    int device;
    ring_serve serve;
    void *with;
    size_t payload_bytes;
    sem_t started;
    _Atomic bool ending;
    _Atomic uint64_t found_awake;
    unsigned count;
    struct ring rings[];
};

/* ---- io_uring --------------------------------------------------------------------------------------------- */

static int submit(const struct ring *r, unsigned count)
{
    return (int)syscall(SYS_io_uring_enter, r->fd, count, 0, 0, NULL, 0);
}

/* ... and wait for something to be there. ETIME: nothing was for a while, and that is worth knowing. */
static int submit_and_wait(const struct ring *r, unsigned count)
{
    struct __kernel_timespec time = {.tv_sec = WHILE_S};
    struct io_uring_getevents_arg how = {.ts = (uintptr_t)&time};
    if (!r->large)
        return (int)syscall(SYS_io_uring_enter, r->fd, count, 1, IORING_ENTER_GETEVENTS, NULL, 0);
    return (int)syscall(SYS_io_uring_enter, r->fd, count, 1, IORING_ENTER_GETEVENTS | IORING_ENTER_EXT_ARG, &how,
                        sizeof how);
}

/* ... and have the kernel hand over what waits for this thread to be in a call. */
static int submit_and_take(const struct ring *r, unsigned count)
{
    return (int)syscall(SYS_io_uring_enter, r->fd, count, 0, IORING_ENTER_GETEVENTS, NULL, 0);
}

static bool has_completions(const struct ring *r)
{
    return atomic_load_explicit(r->complete_tail, memory_order_acquire)
        != atomic_load_explicit(r->complete_head, memory_order_relaxed);
}

/* Whether there would be some after a call. */
static bool is_to_take(const struct ring *r)
{
    return atomic_load_explicit(r->submit_flags, memory_order_relaxed) & IORING_SQ_TASKRUN;
}

/* A place in the queue of submissions, which has one for every entry and for the bell. */
static struct submission *next_submission(struct ring *r)
{
    uint32_t tail = atomic_load_explicit(r->submit_tail, memory_order_relaxed);
    struct submission *s = &r->submissions[tail & r->submit_mask];
    memset(s, 0, sizeof *s);
    return s;
}

static void submitted(struct ring *r)
{
    uint32_t tail = atomic_load_explicit(r->submit_tail, memory_order_relaxed);
    atomic_store_explicit(r->submit_tail, tail + 1, memory_order_release);
}

static uint32_t unsubmitted(const struct ring *r)
{
    return atomic_load_explicit(r->submit_tail, memory_order_relaxed)
        - atomic_load_explicit(r->submit_head, memory_order_acquire);
}

/* In memory of ours (NO_MMAP): a mapping of the ring's would hold it open as long as any thread of this process is there,
 * such as one that waits for a lower that is gone. */
static int make_ring(struct ring *r)
{
    struct io_uring_params p = {.flags = IORING_SETUP_SQE128 | IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN
                                    | IORING_SETUP_TASKRUN_FLAG | IORING_SETUP_R_DISABLED | IORING_SETUP_NO_MMAP};
    r->queues_bytes = QUEUES_BYTES;
    r->submissions_bytes = SUBMISSIONS * sizeof(struct submission);
    r->queues = mmap(NULL, r->queues_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    r->submissions = mmap(NULL, r->submissions_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (r->queues == MAP_FAILED || r->submissions == MAP_FAILED)
        return -1;
    p.cq_off.resv2 = (uintptr_t)r->queues; /* user_addr of newer headers */
    p.sq_off.resv2 = (uintptr_t)r->submissions;
    r->fd = (int)syscall(SYS_io_uring_setup, SUBMISSIONS, &p);
    if (r->fd < 0)
        return -1;
    size_t submits = p.sq_off.array + p.sq_entries * sizeof(uint32_t);
    size_t completes = p.cq_off.cqes + p.cq_entries * sizeof(struct io_uring_cqe);
    if (p.sq_entries != SUBMISSIONS || submits > r->queues_bytes || completes > r->queues_bytes) {
        errno = EOVERFLOW;
        return -1;
    }
    r->submit_head = (void *)(r->queues + p.sq_off.head);
    r->submit_tail = (void *)(r->queues + p.sq_off.tail);
    r->submit_flags = (void *)(r->queues + p.sq_off.flags);
    r->complete_head = (void *)(r->queues + p.cq_off.head);
    r->complete_tail = (void *)(r->queues + p.cq_off.tail);
    r->submit_mask = p.sq_entries - 1;
    r->complete_mask = p.cq_entries - 1;
    r->completions = (void *)(r->queues + p.cq_off.cqes);
    uint32_t *array = (void *)(r->queues + p.sq_off.array);
    for (uint32_t i = 0; i < p.sq_entries; i++)
        array[i] = i;
    r->bell = eventfd(0, EFD_CLOEXEC);
    return r->bell < 0 ? -1 : 0;
}

static void unmake_ring(struct ring *r)
{
    if (r->queues != MAP_FAILED)
        munmap(r->queues, r->queues_bytes);
    if (r->submissions != MAP_FAILED)
        munmap(r->submissions, r->submissions_bytes);
    if (r->memory != MAP_FAILED)
        munmap(r->memory, r->memory_bytes);
    if (r->fd >= 0)
        close(r->fd);
    if (r->bell >= 0)
        close(r->bell);
    pthread_mutex_destroy(&r->lock);
}

/* Who calls is the one who may use it from now on. */
static int enable(const struct ring *r)
{
    return (int)syscall(SYS_io_uring_register, r->fd, IORING_REGISTER_ENABLE_RINGS, NULL, 0);
}

/* ---- Commands --------------------------------------------------------------------------------------------- */

static void command(struct ring *r, struct entry *e, uint32_t operation, unsigned queue, uint64_t commit_id)
{
    struct submission *s = next_submission(r);
    s->sqe.opcode = IORING_OP_URING_CMD;
    s->sqe.fd = r->all->device;
    s->sqe.cmd_op = operation;
    s->sqe.user_data = (uintptr_t)e;
    if (operation == URING_REGISTER) {
        s->sqe.addr = (uintptr_t)e->parts;
        s->sqe.len = 2;
    }
    s->command.commit_id = commit_id;
    s->command.queue = (uint16_t)queue;
    submitted(r);
}

static void commit(struct ring *r, struct entry *e)
{
    e->busy = false;
    r->large |= e->large;
    command(r, e, URING_COMMIT, r->queue, e->header->commit_id);
}

static void listen_to_bell(struct ring *r)
{
    struct submission *s = next_submission(r);
    s->sqe.opcode = IORING_OP_READ;
    s->sqe.fd = r->bell;
    s->sqe.addr = (uintptr_t)&r->rung;
    s->sqe.len = sizeof r->rung;
    submitted(r); /* its user data is 0 */
    r->listens = true;
}

static void ring_bell(const struct ring *r)
{
    uint64_t one = 1;
    ssize_t ignored = write(r->bell, &one, sizeof one);
    (void)ignored;
}

static void commit_answered(struct ring *r)
{
    pthread_mutex_lock(&r->lock);
    struct entry *e = r->answered;
    r->answered = NULL;
    pthread_mutex_unlock(&r->lock);
    if (e)
        eager_answered(r->eager = &r->eager_elsewhere, timing_now());
    for (struct entry *next; e; e = next) {
        next = e->next;
        commit(r, e);
    }
}

/* ---- A ring's thread -------------------------------------------------------------------------------------- */

static void note_size(struct entry *e, size_t bytes) { e->large |= bytes > KEPT_BYTES; }

/* Memory of entries that the kernel has. It writes there only while this thread is in io_uring_enter. */
static void give_back(struct ring *r)
{
    r->large = false;
    for (struct entry *e = r->entries; e < r->entries + ENTRIES; e++)
        if (!e->busy && e->large) {
            (void)madvise(e->payload, r->all->payload_bytes + SPARE, MADV_DONTNEED_LOCKED);
            e->large = false;
        }
}

/* Returns whether it was answered here. Programs whose answers wait go on only after a call. */
static bool take_request(struct ring *r, struct entry *e)
{
    e->busy = true;
    note_size(e, e->header->payload_bytes);
    if (!r->all->serve(r->all->with, r->queue, e))
        return false;
    commit(r, e);
    if (e->header->payload_bytes > SMALL_BYTES || ++r->waits == TOGETHER) {
        (void)submit(r, unsubmitted(r));
        r->waits = 0;
    }
    return true;
}

static void look_at_completions(struct ring *r)
{
    unsigned requests = 0, answered = 0;
    uint32_t head = atomic_load_explicit(r->complete_head, memory_order_relaxed);
    r->waits = 0;
    while (head != atomic_load_explicit(r->complete_tail, memory_order_acquire)) {
        const struct io_uring_cqe *c = &r->completions[head & r->complete_mask];
        struct entry *e = (void *)(uintptr_t)c->user_data;
        int32_t result = c->res;
        atomic_store_explicit(r->complete_head, ++head, memory_order_release);
        if (!e) {
            r->listens = false;
        } else if (result < 0) { /* refused, or the connection is over */
            r->error = -result;
        } else {
            if (!requests++ && eager_found(r->eager))
                atomic_fetch_add_explicit(&r->all->found_awake, 1, memory_order_relaxed);
            answered += take_request(r, e);
        }
    }
    if (answered)
        eager_answered(r->eager = &r->eager_here, timing_now());
}

/* Commit, and look for a request for a moment before sleeping, where that pays: no call is needed for that. Returns whether
 * there may be something. */
static bool look_for_more(struct ring *r)
{
    bool looks = eager_looks(r->eager, timing_now());
    if (looks && unsubmitted(r))
        (void)submit_and_take(r, unsubmitted(r));
    while (looks && !has_completions(r) && !is_to_take(r)) {
        looks = eager_looks(r->eager, timing_now());
    }
    if (looks && !has_completions(r))
        (void)submit_and_take(r, 0);
    return looks;
}

/* Where the programs are whose requests it gets, if that is permitted. */
static void stay_on(unsigned cpu)
{
    cpu_set_t permitted, one;
    CPU_ZERO(&one);
    if (cpu < CPU_SETSIZE && !sched_getaffinity(0, sizeof permitted, &permitted) && CPU_ISSET(cpu, &permitted)) {
        CPU_SET(cpu, &one);
        (void)sched_setaffinity(0, sizeof one, &one);
    }
}

/* Returns whether it may go on. */
static bool register_entries(struct ring *r)
{
    if (enable(r)) {
        r->error = errno;
        return false;
    }
    for (struct entry *e = r->entries; e < r->entries + ENTRIES; e++)
        command(r, e, URING_REGISTER, r->queue, 0);
    while (unsubmitted(r))
        if (submit(r, unsubmitted(r)) < 0 && errno != EINTR) {
            r->error = errno;
            return false;
        }
    return true;
}

static void *run_ring(void *arg)
{
    struct ring *r = arg;
    stay_on(r->queue);
    bool goes_on = register_entries(r);
    if (goes_on) /* what was refused is told at once; a request that has come already is served */
        look_at_completions(r);
    sem_post(&r->all->started);
    for (unsigned turn = 1; goes_on && !atomic_load(&r->all->ending); turn++) {
        if (turn % STAY_EVERY == 0 && sched_getcpu() != (int)r->queue) /* what a process may run on can be changed at any time */
            stay_on(r->queue);
        commit_answered(r);
        if (!r->listens)
            listen_to_bell(r);
        if (!look_for_more(r) && submit_and_wait(r, unsubmitted(r)) < 0) {
            if (errno == ETIME)
                give_back(r);
            else if (errno != EINTR && errno != EAGAIN && errno != EBUSY)
                break;
        }
        look_at_completions(r);
    }
    commit_answered(r);
    (void)submit(r, unsubmitted(r));
    return NULL;
}

/* ---- Life ------------------------------------------------------------------------------------------------- */

/* How many queues the kernel has: CPUs that there may ever be. */
static unsigned possible_cpus(void)
{
    FILE *f = fopen("/sys/devices/system/cpu/possible", "re");
    unsigned first, last, count = 0;
    char between;
    while (f && fscanf(f, "%u", &first) == 1) {
        last = first;
        if (fscanf(f, "%c", &between) == 1 && between == '-' && (fscanf(f, "%u", &last) != 1 || last < first))
            break;
        count += last - first + 1;
        if (between == '-' && (fscanf(f, "%c", &between) != 1 || between != ','))
            break;
    }
    if (f)
        fclose(f);
    return count;
}

struct rings *rings_new(size_t payload_bytes)
{
    unsigned count = possible_cpus();
    struct rings *all = count && count <= MOST_RINGS ? calloc(1, sizeof *all + count * sizeof all->rings[0]) : NULL;
    if (!all) {
        errno = count ? ENOMEM : ENOSYS;
        return NULL;
    }
    all->payload_bytes = payload_bytes;
    all->count = count;
    sem_init(&all->started, 0, 0);
    for (unsigned i = 0; i < count; i++) {
        struct ring *r = &all->rings[i];
        r->all = all;
        r->queue = i;
        r->eager = &r->eager_here;
        r->fd = r->bell = -1;
        r->queues = r->memory = MAP_FAILED;
        r->submissions = MAP_FAILED;
        pthread_mutex_init(&r->lock, NULL);
    }
    for (unsigned i = 0; i < count; i++)
        if (make_ring(&all->rings[i])) {
            int error = errno;
            rings_free(all);
            errno = error;
            return NULL;
        }
    return all;
}

unsigned rings_count(const struct rings *all) { return all->count; }

int rings_descriptor(const struct rings *all, unsigned ring) { return all->rings[ring].fd; }

uint64_t rings_found_awake(const struct rings *all) { return atomic_load(&all->found_awake); }

/* Only now: what is mapped when the process locks its memory is faulted in, and most entries are never used. The kernel takes
 * the entry that was used last. */
static int map_entries(struct ring *r)
{
    size_t headers = (ENTRIES * sizeof(struct entry_header) + TM_PAGE - 1) / TM_PAGE * TM_PAGE;
    size_t each = (r->all->payload_bytes + TM_PAGE - 1) / TM_PAGE * TM_PAGE + SPARE;
    r->memory_bytes = headers + ENTRIES * each;
    r->memory = mmap(NULL, r->memory_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (r->memory == MAP_FAILED)
        return -1;
    for (unsigned i = 0; i < ENTRIES; i++) {
        struct entry *e = &r->entries[i];
        e->ring = r;
        e->header = (struct entry_header *)r->memory + i;
        e->payload = r->memory + headers + i * each;
        e->parts[0] = (struct iovec){e->header, sizeof *e->header};
        e->parts[1] = (struct iovec){e->payload, r->all->payload_bytes};
    }
    return 0;
}

/* Have the kernel refuse an entry by a ring that has no thread, so that it does without rings. */
static void be_refused(struct ring *r)
{
    if (enable(r))
        return;
    command(r, &r->entries[0], URING_REGISTER, NO_QUEUE, 0);
    (void)submit(r, unsubmitted(r));
}

int rings_start(struct rings *all, int device, ring_serve serve, void *with)
{
    unsigned running = 0;
    int error = 0;
    all->device = device;
    all->serve = serve;
    all->with = with;
    for (struct ring *r = all->rings; !error && r < all->rings + all->count; r++) {
        error = !serve ? ENOMEM : map_entries(r) ? errno : reader_thread(&r->thread, run_ring, r);
        if (error)
            be_refused(r);
        r->runs = !error;
        running += r->runs;
    }
    for (unsigned i = 0; i < running; i++)
        while (sem_wait(&all->started))
            ; /* a signal */
    for (unsigned i = 0; !error && i < running; i++)
        error = all->rings[i].error;
    errno = error;
    return error ? -1 : 0;
}

void rings_stop(struct rings *all)
{
    atomic_store(&all->ending, true);
    for (struct ring *r = all->rings; r < all->rings + all->count; r++)
        if (r->runs)
            ring_bell(r);
    for (struct ring *r = all->rings; r < all->rings + all->count; r++)
        if (r->runs) {
            pthread_join(r->thread, NULL);
            /* What waits in the ring refers to the device, and would keep the connection open. The number stays taken, as
             * `rings_descriptor` has told it. */
            (void)dup2(r->bell, r->fd);
            r->runs = false;
        }
}

void rings_free(struct rings *all)
{
    if (!all)
        return;
    rings_stop(all);
    for (unsigned i = 0; i < all->count; i++)
        unmake_ring(&all->rings[i]);
    sem_destroy(&all->started);
    free(all);
}

/* ---- Entries ---------------------------------------------------------------------------------------------- */

const struct fuse_in_header *entry_request(const struct entry *e) { return &e->header->head.in; }

const void *entry_argument(const struct entry *e) { return e->header->argument; }

uint8_t *entry_payload(struct entry *e, size_t bytes)
{
    note_size(e, bytes);
    return e->payload;
}

size_t entry_most(const struct entry *e) { return e->ring->all->payload_bytes; }

size_t entry_copy(const struct entry *e, uint8_t *to, size_t room)
{
    const struct entry_header *h = e->header;
    size_t length = h->head.in.len, payload = h->payload_bytes, head = sizeof h->head.in;
    if (payload > e->ring->all->payload_bytes || length < head + payload || length > room
        || length - head - payload > sizeof h->argument)
        return 0;
    size_t argument = length - head - payload;
    memcpy(to, &h->head.in, head);
    memcpy(to + head, h->argument, argument);
    memcpy(to + head + argument, e->payload, payload);
    return length;
}

void entry_fill(struct entry *e, int error, const uint8_t *bytes, size_t length)
{
    struct entry_header *h = e->header;
    if (length > e->ring->all->payload_bytes) {
        error = -EIO;
        length = 0;
    }
    note_size(e, length);
    if (length && bytes != e->payload)
        memmove(e->payload, bytes, length);
    h->head.out = (struct fuse_out_header){
        .len = (uint32_t)(sizeof h->head.out + length), .error = error, .unique = h->commit_id};
    h->payload_bytes = (uint32_t)length;
}

void entry_answer(struct entry *e, int error, const uint8_t *bytes, size_t length)
{
    struct ring *r = e->ring;
    entry_fill(e, error, bytes, length);
    pthread_mutex_lock(&r->lock);
    bool first = !r->answered;
    e->next = r->answered;
    r->answered = e;
    pthread_mutex_unlock(&r->lock);
    if (first)
        ring_bell(r);
}
