#include "reader_piped.h"

#include "tm.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

/* `device`: /dev/fuse. What is spliced into a socket is not one message. */
void piped_init(struct piped *p, int device, size_t largest)
{
    struct stat st;
    p->device = !fstat(device, &st) && S_ISCHR(st.st_mode) ? device : -1;
    p->ends[0] = p->ends[1] = -1;
    p->largest = largest;
}

static void close_pipe(struct piped *p)
{
    for (unsigned i = 0; i < 2; i++) {
        if (p->ends[i] >= 0)
            close(p->ends[i]);
        p->ends[i] = -1;
    }
    p->places = 0;
}

void piped_free(struct piped *p) { close_pipe(p); }

void piped_rest(struct piped *p, bool all)
{
    if (!p->lately || all)
        close_pipe(p);
    p->lately = false;
}

/* Pages that so many bytes lie in. */
static size_t pages_of(const uint8_t *data, size_t length)
{
    return ((uintptr_t)data % TM_PAGE + length + TM_PAGE - 1) / TM_PAGE;
}

/* As large as the largest reply needs, or as it may be. */
static bool has_pipe(struct piped *p)
{
    if (p->ends[0] >= 0)
        return true;
    if (pipe2(p->ends, O_CLOEXEC | O_NONBLOCK)) { /* programs have too much open: they will close it again */
        p->failures += MUTANT(98);
        return false;
    }
    int size = -1;
    for (size_t want = 2 * p->largest; size < 0 && want > PIPED_LEAST; want /= 2)
        size = fcntl(p->ends[1], F_SETPIPE_SZ, (int)want);
    p->places = size < 0 ? 0 : (size_t)size / TM_PAGE;
    return true;
}

bool piped_reply(struct piped *p, uint64_t unique, const uint8_t *data, size_t length)
{
    /* Aligned, it lies in one page. */
    _Alignas(16) struct fuse_out_header out = {.len = (uint32_t)(sizeof out + length), .unique = unique};
    struct iovec parts[2] = {{&out, sizeof out}, {(void *)data, length}};
    if (p->device < 0 || length < PIPED_LEAST || p->failures >= PIPED_FAILURES || !has_pipe(p) || 1 + pages_of(data, length) > p->places)
        return false;
    /* Were there not as much room as it seems, a pipe that has O_NONBLOCK alone would be waited for. */
    ssize_t n = vmsplice(p->ends[1], parts, 2, SPLICE_F_NONBLOCK);
    p->lately = true;
    bool sent = n == (ssize_t)out.len && splice(p->ends[0], NULL, p->device, NULL, out.len, SPLICE_F_NONBLOCK) == n;
    bool gone = !sent && n == (ssize_t)out.len && errno == ENOENT; /* nobody waits for it any more */
    if (sent) {
        p->failures = 0;
        return true;
    }
    p->failures += !gone;
    if (!MUTANT(73))
        close_pipe(p); /* there may be something in it */
    return gone;
}
