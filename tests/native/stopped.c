/* A process that is stopped while it holds a lock of the segment, or condemns an object, does not keep the others waiting.
 *
 *   stopped PATH
 *
 * For each kind of lock a child takes it and stops itself; we take it after that, and the child must have been
 * continued for it. Also when it is another thread of the child that holds the lock. At last a child stops in the midst of
 * destroying an empty object, to which we put. */
#include "witness.h"

#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static const char *path;
static int stop_at;

void kill_point(int point)
{
    if (stop_at && point == stop_at)
        raise(SIGSTOP);
}

static struct tm_lock *lock_of(struct tm_segment *seg, int kind)
{
    return kind == 0 ? &seg->super->control : kind == 1 ? &seg->super->chunk_lock : &seg->super->shards[3];
}

static void *hold_and_stop(void *lock)
{
    lock_take(lock);
    raise(SIGSTOP); /* to this thread, so that it is stopped before it drops the lock */
    lock_drop(lock);
    return NULL;
}

/* In the child; 0 when it has been continued and has ended all it began. */
static int be_stopped(int kind, bool thread)
{
    struct tm_segment *seg;
    if (tm_attach(path, &seg))
        return 1;
    struct tm_lock *lock = lock_of(seg, kind);
    pthread_t other;
    if (!thread) {
        hold_and_stop(lock);
    } else if (pthread_create(&other, NULL, hold_and_stop, lock) || pthread_join(other, NULL)) {
        return 1;
    }
    return 0;
}

static int try_one(struct tm_segment *seg, int kind, bool thread)
{
    int status;
    struct timespec begin, end;
    pid_t child = fork();
    if (child == 0)
        _exit(be_stopped(kind, thread));
    if (waitpid(child, &status, WUNTRACED) != child || !WIFSTOPPED(status)) {
        fprintf(stderr, "FAIL the child did not stop (kind %d)\n", kind);
        return 1;
    }
    alarm(20);
    clock_gettime(CLOCK_MONOTONIC, &begin);
    lock_take(lock_of(seg, kind));
    clock_gettime(CLOCK_MONOTONIC, &end);
    lock_drop(lock_of(seg, kind));
    alarm(0);
    double waited = (double)(end.tv_sec - begin.tv_sec) + (double)(end.tv_nsec - begin.tv_nsec) / 1e9;
    if (waitpid(child, &status, 0) != child || !WIFEXITED(status) || WEXITSTATUS(status)) {
        fprintf(stderr, "FAIL the child did not end well (kind %d)\n", kind);
        return 1;
    }
    printf("lock %d, %s: had after %.0f ms\n", kind, thread ? "a thread" : "a process", waited * 1000);
    return waited > 5; /* milliseconds if nothing else runs; for ever with the mutant */
}

static int destroy_and_stop(void)
{
    struct tm_segment *seg;
    prctl(PR_SET_PDEATHSIG, SIGKILL); /* with the mutant it is never continued, and we do not get on */
    if (tm_attach(path, &seg))
        return 1;
    stop_at = 27;
    return object_reap_empty(ctx_get(seg), 100) > 1;
}

static int put_beside_destroyer(struct tm_segment *seg)
{
    static const uint8_t oid[TM_OID];
    struct tm_ctx *ctx = ctx_get(seg);
    struct tm_handle pool = {.seg = seg};
    uint32_t id, serial;
    uint8_t page[TM_PAGE], back[TM_PAGE];
    int status;
    client_open(ctx, "test", true, &id, &serial);
    pool_new(ctx, id, serial, &(struct pool_wish){.persistent = true, .id = -1}, &pool.pool, &pool.serial);
    page_make(page, 1, 1);
    tm_put(&pool, oid, 1, page, 1, KEEP_OLD);
    tm_flush(&pool, oid, 1, 1);
    pid_t child = fork();
    if (child == 0)
        _exit(destroy_and_stop());
    if (waitpid(child, &status, WUNTRACED) != child || !WIFSTOPPED(status)) {
        fprintf(stderr, "FAIL the destroyer did not stop\n");
        return 1;
    }
    alarm(10);
    page_make(page, 1, 2);
    int failed = tm_put(&pool, oid, 1, page, 1, KEEP_OLD) != 1;
    alarm(0);
    failed |= waitpid(child, &status, 0) != child || !WIFEXITED(status) || WEXITSTATUS(status);
    failed |= tm_get(&pool, oid, 1, back, 1) != 1 || memcmp(page, back, TM_PAGE) != 0;
    printf("destroyer: %s\n", failed ? "FAILED" : "did not keep the put waiting");
    return failed;
}

int main(int argc, char **argv)
{
    struct tm_segment *seg;
    int failed = 0;
    if (argc != 2)
        return 2;
    path = argv[1];
    unlink(path);
    if (tm_create(path, 16u << 20, &seg))
        return 2;
    for (int kind = 0; kind < 3; kind++)
        for (int thread = 0; thread < 2; thread++)
            failed += try_one(seg, kind, thread);
    failed += put_beside_destroyer(seg);
    tm_close(seg);
    unlink(path);
    return failed != 0;
}
