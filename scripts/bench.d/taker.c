/* Takes memory as fast as it can and says how long that took: taker BYTES. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <time.h>

static double now(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec + (double)ts.tv_nsec / 1e9;
}

int main(int argc, char **argv)
{
    size_t size = argc == 2 ? strtoull(argv[1], NULL, 10) : 0;
    uint8_t *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    double worst = 0, begin, before;
    if (!size || memory == MAP_FAILED)
        return 2;
    begin = before = now();
    for (size_t at = 0; at < size; at += 4096) {
        memory[at] = 1;
        if (at % (1 << 20) == 0) {
            double after = now();
            worst = after - before > worst ? after - before : worst;
            before = after;
        }
    }
    begin = now() - begin;
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    printf("{\"seconds\": %.6f, \"cpu_seconds\": %.6f, \"worst_mib_seconds\": %.6f}\n", begin,
           (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec)
               + (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6,
           worst);
    return 0;
}
