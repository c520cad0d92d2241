/* How this process reads records of tiers, and the steps of a demotion (methods of Client).
 *
 * Each client's source is a spill file, which is read here with the GIL released, or a callable, which gets a list of
 * locations and returns a list of bytes or None. A client that has none yet is looked up once it is needed:
 * tmem.backends.tiering.source(path, nonce, id, serial) returns one of the two. What does not answer is tried
 * again for `patience_ms`, with nothing held but the thread's own window; the slot is looked at between two tries.
 *
 * Everything here is under the GIL; a source that was replaced stays until the process ends, for somebody may be
 * reading from it. */
#include "py.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

struct source {
    uint32_t serial, epoch; /* of the client, and of its tier */
    struct tm_spill spill;
    PyObject *read; /* or NULL: the spill file */
};
struct sources {
    struct source *of[TM_MAX_CLIENTS];
    unsigned patience_ms;
};

static struct sources *sources_of(struct tm_segment *seg)
{
    return seg->fetcher;
}

static void nap(void)
{
    const struct timespec pause = {.tv_nsec = 20000000};
    Py_BEGIN_ALLOW_THREADS
    nanosleep(&pause, NULL);
    Py_END_ALLOW_THREADS
}

/* Make `what`, a path or a callable, the source of that client's tier of `epoch`. 0, or an exception. */
static int use_source(struct tm_segment *seg, uint32_t id, uint32_t serial, uint32_t epoch, PyObject *what)
{
    struct source *s = calloc(1, sizeof *s);
    if (!s) {
        PyErr_NoMemory();
        return -1;
    }
    s->serial = serial;
    s->epoch = epoch;
    if (PyUnicode_Check(what)) {
        PyObject *bytes = NULL;
        int rc = -EINVAL;
        if (PyUnicode_FSConverter(what, &bytes)) {
            const char *path = PyBytes_AsString(bytes);
            Py_BEGIN_ALLOW_THREADS /* a disk that hangs must not stop those who need none */
            rc = spill_open(path, seg->super->nonce, id, serial, &s->spill);
            Py_END_ALLOW_THREADS
        }
        Py_XDECREF(bytes);
        if (rc) {
            free(s);
            if (rc == -ESTALE)
                PyErr_Format(TierCorruptError, "%U is not the spill file of this client", what);
            else if (!PyErr_Occurred())
                PyErr_Format(TierDownError, "the spill file %U cannot be read: %s", what, strerror(-rc));
            return -1;
        }
    } else if (PyCallable_Check(what)) {
        s->read = Py_NewRef(what);
    } else {
        free(s);
        PyErr_SetString(PyExc_TypeError, "a source is a path or a callable");
        return -1;
    }
    sources_of(seg)->of[id] = s;
    return 0;
}

/* Ask Python where the client's records are. `epoch` was read before: if what is found is of a later tier, it is looked for
 * again, but what is found of an earlier one must not be taken for the later one's. */
static void find_source(struct tm_segment *seg, uint32_t id, uint32_t serial, uint32_t epoch)
{
    PyObject *module = PyImport_ImportModule("tmem.backends.tiering"), *found = NULL;
    PyObject *path = module ? PyUnicode_DecodeFSDefault(seg->path) : NULL;
    if (path)
        found = PyObject_CallMethod(module, "source", "OKII", path, (unsigned long long)seg->super->nonce, id, serial);
    if (found && found != Py_None)
        use_source(seg, id, serial, epoch, found);
    Py_XDECREF(found);
    Py_XDECREF(path);
    Py_XDECREF(module);
}

/* Copy what the callable returned into the window. */
static int take_records(struct tm_window *w, PyObject *list)
{
    uint32_t used = 0;
    for (uint32_t i = 0; PyList_Check(list) && i < w->nwanted && (Py_ssize_t)i < PyList_Size(list); i++) {
        PyObject *item = PyList_GetItem(list, (Py_ssize_t)i);
        char *data;
        Py_ssize_t n;
        if (item == Py_None)
            continue;
        if (PyBytes_AsStringAndSize(item, &data, &n))
            return TM_DOWN;
        n = n < (Py_ssize_t)(TM_HEADER + TM_PAGE) ? n : (Py_ssize_t)(TM_HEADER + TM_PAGE);
        if (used + (uint32_t)n > TM_WINDOW)
            break;
        memcpy(w->bytes + used, data, (size_t)n);
        w->held[w->nheld++] = (struct tm_held){w->wanted[i], used, (uint32_t)n};
        used += ((uint32_t)n + 15) / 16 * 16;
    }
    /* The first is what is needed. */
    return w->nheld && w->held[0].location == w->wanted[0] ? TM_OK : TM_CORRUPT;
}

static int call_source(PyObject *read, struct tm_window *w)
{
    PyObject *wanted = PyList_New((Py_ssize_t)w->nwanted), *list = NULL;
    int rc = TM_DOWN;
    for (uint32_t i = 0; wanted && i < w->nwanted; i++) {
        PyObject *n = PyLong_FromUnsignedLongLong(w->wanted[i]);
        if (!n || PyList_SetItem(wanted, (Py_ssize_t)i, n))
            Py_CLEAR(wanted);
    }
    if (wanted)
        list = PyObject_CallFunctionObjArgs(read, wanted, NULL);
    if (list)
        rc = take_records(w, list);
    else if (PyErr_ExceptionMatches(TierCorruptError))
        rc = TM_CORRUPT;
    Py_XDECREF(list);
    Py_XDECREF(wanted);
    return rc;
}

static int fetch_once(struct tm_segment *seg, uint32_t client, struct tm_window *w)
{
    uint32_t serial = atomic_load(&seg->clients[client].serial);
    struct source *s = sources_of(seg)->of[client];
    int rc = TM_DOWN;
    uint32_t epoch = atomic_load(&seg->clients[client].tier_epoch);
    if (!s || s->serial != serial || s->epoch != epoch) {
        find_source(seg, client, serial, epoch);
        s = sources_of(seg)->of[client];
    }
    w->nheld = 0;
    if (!s || s->serial != serial || s->epoch != epoch)
        return TM_DOWN;
    if (s->read)
        return call_source(s->read, w);
    Py_BEGIN_ALLOW_THREADS
    rc = spill_fetch(&s->spill, w);
    Py_END_ALLOW_THREADS
    return rc;
}

/* A try that fails is no error yet: with nothing held the caller looks at the slot again, which may hold another page by
 * now, and comes back if not. */
static int fetch(struct tm_ctx *ctx, uint32_t client)
{
    struct tm_segment *seg = ctx->seg;
    struct tm_window *w = &ctx->window;
    PyGILState_STATE state = PyGILState_Ensure(); /* the caller may hold the GIL, or not */
    uint64_t began = timing_now();
    int rc = fetch_once(seg, client, w);
    PyErr_Clear();
    if (rc == TM_OK)
        w->until_ns = 0;
    else
        w->nheld = 0;
    if (rc == TM_DOWN && !w->until_ns)
        w->until_ns = began + (uint64_t)sources_of(seg)->patience_ms * 1000000u;
    if ((rc == TM_DOWN && timing_now() <= w->until_ns) || (rc == TM_CORRUPT && ++w->wrong < TM_WRONG_MOST)) {
        if (rc == TM_DOWN)
            nap();
        rc = TM_OK;
    }
    PyGILState_Release(state);
    return rc;
}

int tier_sources(struct tm_segment *seg)
{
    struct sources *all = calloc(1, sizeof *all);
    if (!all) {
        PyErr_NoMemory();
        return -1;
    }
    all->patience_ms = 30000;
    seg->fetcher = all;
    seg->fetch = fetch;
    return 0;
}

PyObject *tier_patience(struct tm_segment *seg) { return PyLong_FromUnsignedLong(sources_of(seg)->patience_ms); }
void tier_set_patience(struct tm_segment *seg, unsigned ms) { sources_of(seg)->patience_ms = ms; }

PyObject *client_attach_tier(ClientObject *self, PyObject *args)
{
    struct tm_ctx *ctx = context_of(self->owner); /* whose record keeps the segment while others run Python */
    PyObject *what;
    unsigned epoch = ctx ? atomic_load(&ctx->seg->clients[self->id].tier_epoch) : 0;
    if (!ctx || !PyArg_ParseTuple(args, "O|I:attach_tier", &what, &epoch)
        || use_source(ctx->seg, self->id, self->serial, epoch, what))
        return NULL;
    Py_RETURN_NONE;
}

/* (next hand, [(at, length)], pages as `demote` wants them) */
PyObject *client_collect(ClientObject *self, PyObject *args)
{
    struct tm_ctx *ctx = context_of(self->owner);
    unsigned long long start;
    PyObject *target, *result = NULL;
    Py_buffer view;
    int any;
    unsigned most, epoch;
    if (!ctx || !PyArg_ParseTuple(args, "KOIpI:collect", &start, &target, &most, &any, &epoch)
        || PyObject_GetBuffer(target, &view, PyBUF_WRITABLE))
        return NULL;
    uint64_t hand = start;
    int64_t n = TM_NOTHREAD;
    struct tm_candidate *pages = most <= 65536 ? malloc((most + 1) * sizeof *pages) : NULL;
    if (pages && view.len >= TM_HEADER + TM_PAGE) {
        Py_BEGIN_ALLOW_THREADS
        n = tm_collect(ctx, self->id, self->serial, epoch, any, &hand, view.buf, (size_t)view.len, pages, most);
        Py_END_ALLOW_THREADS
        if (n < 0)
            raise_result(n);
    } else {
        PyErr_SetString(PyExc_ValueError, "at most 65536 pages, and room for one record at least");
    }
    PyObject *places = n >= 0 ? PyList_New((Py_ssize_t)n) : NULL;
    for (int64_t i = 0; places && i < n; i++) {
        PyObject *place = Py_BuildValue("(II)", pages[i].at, pages[i].length);
        if (!place || PyList_SetItem(places, (Py_ssize_t)i, place))
            Py_CLEAR(places);
    }
    if (places)
        result = Py_BuildValue("(KNy#)", (unsigned long long)hand, places, (const char *)pages,
                               (Py_ssize_t)((size_t)n * sizeof *pages));
    free(pages);
    PyBuffer_Release(&view);
    return result;
}

PyObject *client_demote(ClientObject *self, PyObject *args)
{
    struct tm_ctx *ctx = context_of(self->owner);
    Py_buffer pages, locations;
    int64_t done = -1;
    if (!ctx || !PyArg_ParseTuple(args, "y*y*:demote", &pages, &locations))
        return NULL;
    size_t n = (size_t)pages.len / sizeof(struct tm_candidate);
    if ((size_t)pages.len == n * sizeof(struct tm_candidate) && (size_t)locations.len == n * 8) {
        Py_BEGIN_ALLOW_THREADS
        done = tm_demote(ctx, self->id, self->serial, pages.buf, locations.buf, (uint32_t)n);
        Py_END_ALLOW_THREADS
        if (done < 0)
            raise_result(done);
    } else {
        PyErr_SetString(PyExc_ValueError, "what collect returned, and as many locations of 8 bytes");
    }
    PyBuffer_Release(&locations);
    PyBuffer_Release(&pages);
    return done < 0 ? NULL : PyLong_FromLongLong(done);
}

/* (next hand, pages) */
PyObject *client_promote(ClientObject *self, PyObject *args)
{
    struct tm_ctx *ctx = context_of(self->owner);
    unsigned long long start;
    unsigned most;
    if (!ctx || !PyArg_ParseTuple(args, "KI:promote", &start, &most))
        return NULL;
    uint64_t hand = start;
    int64_t n;
    Py_BEGIN_ALLOW_THREADS
    n = tm_promote(ctx, self->id, self->serial, &hand, most);
    Py_END_ALLOW_THREADS
    if (n == TM_REFUSED) {
        PyErr_SetString(PoolError, "there is no memory to bring pages back into: raise the cap, or flush something");
        return NULL;
    }
    return n < 0 ? raise_result(n) : Py_BuildValue("(KL)", (unsigned long long)hand, (long long)n);
}

/* (next hand, pages, why not more) */
PyObject *client_prefetch(ClientObject *self, PyObject *args)
{
    struct tm_ctx *ctx = context_of(self->owner);
    unsigned long long start;
    unsigned most, keep;
    int near, why = TM_OK;
    if (!ctx || !PyArg_ParseTuple(args, "KIpI:prefetch", &start, &most, &near, &keep))
        return NULL;
    uint64_t hand = start;
    int64_t n;
    Py_BEGIN_ALLOW_THREADS
    n = tm_prefetch(ctx, self->id, self->serial, near, keep, &hand, most, &why);
    Py_END_ALLOW_THREADS
    const char *word = why == TM_REFUSED ? "room" : why == TM_DOWN ? "down" : why == TM_CORRUPT ? "corrupt" : "";
    return n < 0 ? raise_result(n) : Py_BuildValue("(KLs)", (unsigned long long)hand, (long long)n, word);
}

static int compare(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

/* The locations in ascending order, 8 bytes each; None if somebody is still reading others. */
PyObject *client_live(ClientObject *self, PyObject *arg)
{
    struct tm_ctx *ctx = context_of(self->owner);
    unsigned long timeout = PyLong_AsUnsignedLong(arg);
    if (!ctx || PyErr_Occurred())
        return NULL;
    uint64_t n = 0, most = 1024, *all = NULL;
    bool quiet = false;
    Py_BEGIN_ALLOW_THREADS
    do {
        free(all);
        most = n > most ? n + n / 8 : most;
        all = malloc(most * sizeof *all);
        n = all ? tm_live(ctx, self->id, all, most) : 0;
    } while (all && n > most);
    if (all) {
        qsort(all, n, sizeof *all, compare);
        quiet = tier_grace(ctx, self->id, (unsigned)timeout);
    }
    Py_END_ALLOW_THREADS
    uint64_t kept = 0;
    for (uint64_t i = 0; i < n; i++) /* a slot that moved from one to another while we looked */
        if (!kept || all[i] != all[kept - 1])
            all[kept++] = all[i];
    PyObject *result = !all ? PyErr_NoMemory()
                       : quiet ? PyBytes_FromStringAndSize((const char *)all, (Py_ssize_t)(kept * sizeof *all))
                               : Py_NewRef(Py_None);
    free(all);
    return result;
}
