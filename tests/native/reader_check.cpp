// Checks of csrc/reader.h on a disk that does as it is told. Exit status 0 if all hold; each failure is a line on
// stderr. The argument is how many rounds the random part has.
#include "reader.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "works.h"

namespace {

using moert::BusyClock;
using moert::FileIdentity;
using moert::Lanes;
using moert::Part;
using moert::ReadClass;
using moert::Reader;
using moert::ReaderError;
using moert::ReadState;
using SharedRecord = std::shared_ptr<moert::Record>;

constexpr size_t kBlock = moert::kBlockBytes, kChunk = moert::kChunkBytes, kSlot = 3 * kChunk;
constexpr size_t kFileBytes = 12 * kChunk + 1234;

class File {
  public:
    // Plain files and those in memory are on different devices.
    explicit File(bool in_memory) {
        char path[] = "/tmp/moert-reader-check-XXXXXX";
        fd = in_memory ? memfd_create("moert-reader-check", 0) : mkstemp(path);
        if (!in_memory) unlink(path);
        std::mt19937 random(7);
        content.resize(kFileBytes);
        for (uint8_t& byte : content) byte = static_cast<uint8_t>(random());
        CHECK(pwrite(fd, content.data(), content.size(), 0) == static_cast<ssize_t>(content.size()));
        struct stat status;
        CHECK(fstat(fd, &status) == 0);
        identity = {status.st_dev, status.st_ino, status.st_size,
                    int64_t{status.st_mtim.tv_sec} * 1'000'000'000 + status.st_mtim.tv_nsec};
    }
    ~File() { close(fd); }

    Part part(size_t offset, size_t nbytes, uint8_t* destination) const {
        const size_t begin = offset / kBlock * kBlock, needed = offset + nbytes - begin;
        return {fd, identity, begin, (needed + kBlock - 1) / kBlock * kBlock, needed, destination};
    }

    int fd = -1;
    FileIdentity identity;
    std::vector<uint8_t> content;
};

struct Memory {
    explicit Memory(size_t count) : slots(count) {
        for (uint8_t*& slot : slots) {
            slot = static_cast<uint8_t*>(std::aligned_alloc(kBlock, kSlot + kBlock));
            std::memset(slot, 0xEE, kSlot + kBlock);
        }
    }
    ~Memory() {
        for (uint8_t* slot : slots) std::free(slot);
    }
    std::vector<uint8_t*> slots;
};

// Where each read that has begun waits to be let through, on `fd` or on all files.
struct Disk {
    std::mutex mutex;
    std::condition_variable changed;
    bool shut = false;
    int shut_fd = -1;
    int tickets = 0;
    std::vector<uint64_t> begun;  // offsets
    std::deque<int> script;       // a negative errno, or how many bytes may come
    std::atomic<int> delay_ms{0};
} disk;

ssize_t told(int fd, void* to, size_t nbytes, off_t offset) {
    int step = 0;
    {
        std::unique_lock<std::mutex> lock(disk.mutex);
        disk.begun.push_back(static_cast<uint64_t>(offset));
        if (!disk.script.empty()) {
            step = disk.script.front();
            disk.script.pop_front();
        }
        const bool held = disk.shut && (disk.shut_fd < 0 || disk.shut_fd == fd);
        if (held) {
            disk.changed.wait(lock, [] { return disk.tickets > 0 || !disk.shut; });
            disk.tickets--;
        }
    }
    if (disk.delay_ms > 0) std::this_thread::sleep_for(milliseconds(disk.delay_ms));
    if (step < 0) {
        errno = -step;
        return -1;
    }
    return pread(fd, to, step > 0 ? std::min(nbytes, static_cast<size_t>(step)) : nbytes, offset);
}

void shut(int fd = -1) {
    const std::lock_guard<std::mutex> lock(disk.mutex);
    disk.shut = true;
    disk.shut_fd = fd;
    disk.tickets = 0;
    disk.begun.clear();
    disk.script.clear();
}

void let_through(int count) {
    const std::lock_guard<std::mutex> lock(disk.mutex);
    disk.tickets += count;
    disk.changed.notify_all();
}

void open_up() {
    const std::lock_guard<std::mutex> lock(disk.mutex);
    disk.shut = false;
    disk.changed.notify_all();
}

std::vector<uint64_t> begun() {
    const std::lock_guard<std::mutex> lock(disk.mutex);
    return disk.begun;
}

void await_begun(size_t count) {
    await("reads to begin", [&] { return begun().size() >= count; });
}

ReadState wait_for(const SharedRecord& record) {
    await("a record", [&] { return record->outcome.wait(milliseconds(10)); });
    return record->outcome.state();
}

// So long that what could wrongly begin would have.
void settle_down() {
    std::this_thread::sleep_for(milliseconds(20));
}

struct Bench {
    explicit Bench(Lanes lanes) : reader(lanes, clock, told) {}

    SharedRecord submit(size_t offset, size_t nbytes, size_t slot, ReadClass kind = ReadClass::kDemand) {
        return reader.submit({file.part(offset, nbytes, memory.slots[slot])}, nbytes, kind);
    }
    // One chunk.
    SharedRecord block(size_t number, ReadClass kind = ReadClass::kDemand) {
        return submit(number * kBlock, kBlock, number, kind);
    }
    bool holds(size_t slot, size_t offset, size_t nbytes) const {
        return std::memcmp(memory.slots[slot] + offset % kBlock, file.content.data() + offset, nbytes) == 0;
    }

    File file{false};
    Memory memory{16};
    std::shared_ptr<BusyClock> clock = std::make_shared<BusyClock>();
    Reader reader;
};

void any_range_has_the_files_bytes() {
    Bench bench({3, 1});
    std::mt19937 random(1);
    for (int round = 0; round < 300; round++) {
        const size_t longest = round % 3 == 0 ? 100 : round % 3 == 1 ? 20'000 : kSlot;
        const size_t nbytes = 1 + random() % longest;
        const size_t offset = round % 10 == 0 ? kFileBytes - nbytes : random() % (kFileBytes - nbytes);
        const size_t slot = static_cast<size_t>(round) % 16;
        const SharedRecord record = bench.submit(offset, nbytes, slot);
        CHECK(wait_for(record) == ReadState::kWhole);
        CHECK(bench.holds(slot, offset, nbytes));
    }
    CHECK(bench.reader.records() == 300);
}

void chunks_cover_a_part_once() {
    for (size_t blocks = 1; blocks < 1500; blocks++) {
        const Part part{3, {}, 8 * kBlock, blocks * kBlock, blocks * kBlock - 7, reinterpret_cast<uint8_t*>(kBlock)};
        size_t end = 0, needed = 0;
        for (const moert::Chunk& chunk : moert::cut(part, 5)) {
            CHECK(chunk.begin == end);
            CHECK(chunk.nbytes % kBlock == 0 && chunk.nbytes > 0 && chunk.nbytes < 3 * kChunk / 2);
            CHECK(chunk.nbytes >= kChunk / 2 || chunk.nbytes == part.window_bytes);
            CHECK(chunk.needed > 0 && chunk.needed <= chunk.nbytes && chunk.part == 5);
            end += chunk.nbytes;
            needed += chunk.needed;
        }
        CHECK(end == part.window_bytes && needed == part.needed_bytes);
    }
}

void classes_in_order_and_each_in_its_own() {
    Bench bench({1, 1});
    shut();
    std::vector<SharedRecord> records{bench.block(0)};
    await_begun(1);
    constexpr ReadClass kKinds[] = {ReadClass::kPrefetch,  ReadClass::kPromotion, ReadClass::kDemand,
                                    ReadClass::kPromotion, ReadClass::kDemand,    ReadClass::kPrefetch};
    for (size_t i = 0; i < 6; i++) records.push_back(bench.block(i + 1, kKinds[i]));
    open_up();
    for (const SharedRecord& record : records) CHECK(wait_for(record) == ReadState::kWhole);
    std::vector<uint64_t> blocks;
    for (uint64_t offset : begun()) blocks.push_back(offset / kBlock);
    CHECK((blocks == std::vector<uint64_t>{0, 3, 5, 2, 4, 1, 6}));
}

void lanes_share_a_record_and_then_the_next() {
    Bench bench({4, 2});
    shut();
    std::vector<SharedRecord> records;
    for (size_t i = 0; i < 4; i++) records.push_back(bench.submit(i * kSlot, kSlot, i));
    for (int round = 4; round <= 12; round++) {
        await_begun(static_cast<size_t>(round));
        settle_down();
        auto offsets = begun();
        CHECK(offsets.size() == static_cast<size_t>(round));
        std::sort(offsets.begin(), offsets.end());
        for (size_t i = 0; i < offsets.size(); i++) CHECK(offsets[i] == i * kChunk);
        let_through(1);
    }
    open_up();
    for (size_t i = 0; i < 4; i++) {
        CHECK(wait_for(records[i]) == ReadState::kWhole);
        CHECK(bench.holds(i, i * kSlot, kSlot));
    }
    CHECK(bench.reader.bytes_read() == 4 * kSlot);
}

void guesses_leave_lanes_free() {
    Bench bench({4, 2});
    shut();
    std::vector<SharedRecord> records;
    for (size_t i = 0; i < 4; i++) {
        records.push_back(bench.block(i, i % 2 == 0 ? ReadClass::kPrefetch : ReadClass::kPromotion));
    }
    await_begun(2);
    settle_down();
    CHECK(begun().size() == 2);
    for (size_t i = 4; i < 7; i++) records.push_back(bench.block(i));
    await_begun(4);
    settle_down();
    CHECK(begun().size() == 4);
    CHECK(std::min(begun()[2], begun()[3]) == 4 * kBlock && std::max(begun()[2], begun()[3]) == 5 * kBlock);
    open_up();
    for (const SharedRecord& record : records) CHECK(wait_for(record) == ReadState::kWhole);
    // Nor where four lanes are done with demands and look for more.
    const File guessed(false);
    shut(guessed.fd);
    disk.delay_ms = 5;
    records.clear();
    for (size_t i = 0; i < 4; i++) records.push_back(bench.block(i));
    for (size_t i = 4; i < 8; i++) {
        records.push_back(
            bench.reader.submit({guessed.part(0, kBlock, bench.memory.slots[i])}, kBlock, ReadClass::kPrefetch));
    }
    await_begun(6);
    settle_down();
    CHECK(begun().size() == 6);
    disk.delay_ms = 0;
    open_up();
    for (const SharedRecord& record : records) CHECK(wait_for(record) == ReadState::kWhole);
}

void many_at_once_are_read_in_order_by_all_lanes() {
    Bench bench({4, 2});
    for (size_t i = 0; i < 4; i++) bench.block(i);
    await("the threads", [&] { return bench.reader.records() == 4; });
    settle_down();
    shut();
    std::vector<moert::Wanted> wanted;
    for (size_t i = 0; i < 3; i++) {
        const Part part = bench.file.part(i * kSlot, kSlot, bench.memory.slots[i]);
        // Cut for another destination: it is the same for any.
        wanted.push_back({{part}, moert::share_out({bench.file.part(i * kSlot, kSlot, nullptr)}), kSlot, {}});
    }
    const std::vector<SharedRecord> records = bench.reader.submit(std::move(wanted), ReadClass::kDemand);
    for (size_t round = 4; round <= 9; round++) {
        await_begun(round);
        settle_down();
        auto offsets = begun();
        CHECK(offsets.size() == round);
        std::sort(offsets.begin(), offsets.end());
        for (size_t i = 0; i < offsets.size(); i++) CHECK(offsets[i] == i * kChunk);
        let_through(1);
    }
    open_up();
    for (size_t i = 0; i < 3; i++) {
        CHECK(wait_for(records[i]) == ReadState::kWhole);
        CHECK(bench.holds(i, i * kSlot, kSlot));
    }
    CHECK(bench.reader.submit(std::vector<moert::Wanted>{}, ReadClass::kDemand).empty());
}

// Threads that sleep are woken for whatever else can be begun, too.
void sleeping_threads_are_woken_whatever_changes() {
    Bench bench({3, 1});
    for (size_t i = 0; i < 3; i++) bench.submit(i * kSlot, kSlot, i);
    await("the threads", [&] { return bench.reader.records() == 3; });
    settle_down();
    shut();
    std::vector<SharedRecord> guesses;
    for (size_t i = 0; i < 3; i++) guesses.push_back(bench.block(i, ReadClass::kPrefetch));
    await_begun(1);
    settle_down();
    CHECK(begun().size() == 1);
    CHECK(bench.reader.promote(guesses[1]));
    await_begun(2);
    bench.reader.set_lanes(bench.file.identity.device, {3, 3});
    await_begun(3);
    open_up();
    for (const SharedRecord& guess : guesses) CHECK(wait_for(guess) == ReadState::kWhole);
}

void only_what_has_not_begun_is_cancelled() {
    Bench bench({1, 1});
    shut();
    const SharedRecord running = bench.submit(0, kSlot, 0), queued = bench.block(1), last = bench.block(2);
    await_begun(1);
    CHECK(!bench.reader.cancel(running));
    CHECK(bench.reader.cancel(queued));
    CHECK(!bench.reader.cancel(queued));
    CHECK(queued->outcome.state() == ReadState::kCancelled);
    open_up();
    CHECK(wait_for(last) == ReadState::kWhole && wait_for(running) == ReadState::kWhole);
    CHECK(!bench.reader.cancel(running));
    CHECK(bench.memory.slots[1][0] == 0xEE && bench.memory.slots[1][kBlock - 1] == 0xEE);
    CHECK(bench.holds(0, 0, kSlot));
    CHECK(begun().size() == 4 && bench.reader.records() == 2);
}

void what_is_given_up_is_read_no_further() {
    Bench bench({1, 1});
    shut();
    const SharedRecord one = bench.submit(0, kSlot, 0, ReadClass::kPrefetch);
    await_begun(1);
    const SharedRecord last = bench.block(1), queued = bench.submit(0, kSlot, 2, ReadClass::kPrefetch);
    CHECK(bench.reader.give_up(queued) && queued->outcome.state() == ReadState::kCancelled);
    CHECK(queued->nbytes_begun() == 0 && !bench.reader.give_up(queued) && !bench.reader.promote(queued));
    CHECK(bench.reader.give_up(one) && !bench.reader.give_up(one));
    settle_down();
    CHECK(one->outcome.state() == ReadState::kUnderWay);
    let_through(1);
    CHECK(wait_for(one) == ReadState::kCancelled);
    CHECK(one->nbytes_begun() == one->shares[0].chunks->front().nbytes && one->nbytes_begun() < kSlot);
    CHECK(!bench.reader.promote(one));
    open_up();
    CHECK(wait_for(last) == ReadState::kWhole);
    CHECK(begun().size() == 2 && bench.reader.records() == 1);
    // All of it has begun.
    shut();
    const SharedRecord all = bench.block(3, ReadClass::kPrefetch);
    await_begun(1);
    CHECK(!bench.reader.give_up(all));
    open_up();
    CHECK(wait_for(all) == ReadState::kWhole);
    // Taken up again while its first chunk is read, it is as if nothing had been.
    shut();
    const SharedRecord again = bench.submit(0, kSlot, 4, ReadClass::kPrefetch);
    await_begun(1);
    CHECK(bench.reader.give_up(again) && bench.reader.promote(again) && !bench.reader.promote(again));
    open_up();
    CHECK(wait_for(again) == ReadState::kWhole);
    CHECK(bench.holds(4, 0, kSlot));
}

void the_promoted_go_behind_the_demands() {
    Bench bench({1, 1});
    shut();
    const SharedRecord running = bench.submit(0, kSlot, 0, ReadClass::kPrefetch);
    await_begun(1);
    std::vector<SharedRecord> records{bench.submit(kSlot, kBlock, 1, ReadClass::kPrefetch),
                                      bench.submit(kSlot + kBlock, kBlock, 2, ReadClass::kPrefetch),
                                      bench.submit(kSlot + 2 * kBlock, kBlock, 3)};
    CHECK(bench.reader.promote(records[1]));
    CHECK(!bench.reader.promote(records[1]) && !bench.reader.promote(records[2]));
    CHECK(bench.reader.promote(running));  // of which two chunks are left
    open_up();
    for (const SharedRecord& record : records) CHECK(wait_for(record) == ReadState::kWhole);
    CHECK(wait_for(running) == ReadState::kWhole);
    CHECK(!bench.reader.promote(running));
    const std::vector<uint64_t> expected{0, kSlot + 2 * kBlock, kSlot + kBlock, kChunk, 2 * kChunk, kSlot};
    CHECK(begun() == expected);
}

void what_is_raised_goes_to_its_class() {
    Bench bench({1, 1});
    shut();
    const SharedRecord running = bench.submit(0, kSlot, 0, ReadClass::kPrefetch);
    await_begun(1);
    const SharedRecord guess = bench.submit(kSlot, kBlock, 1, ReadClass::kPrefetch),
                       raised = bench.submit(kSlot + kBlock, kBlock, 2, ReadClass::kPrefetch),
                       promotion = bench.submit(kSlot + 2 * kBlock, kBlock, 3, ReadClass::kPromotion),
                       demand = bench.submit(kSlot + 3 * kBlock, kBlock, 4);
    CHECK(bench.reader.promote(raised, ReadClass::kPromotion));
    CHECK(!bench.reader.promote(raised, ReadClass::kPromotion) && !bench.reader.promote(raised, ReadClass::kPrefetch));
    CHECK(!bench.reader.promote(promotion, ReadClass::kPromotion) &&
          !bench.reader.promote(demand, ReadClass::kPrefetch));
    // What is given up and taken up again goes behind all of its class.
    CHECK(bench.reader.give_up(running) && bench.reader.promote(running, ReadClass::kPrefetch));
    open_up();
    for (const SharedRecord& record : {running, guess, raised, promotion, demand}) {
        CHECK(wait_for(record) == ReadState::kWhole);
    }
    CHECK(bench.holds(0, 0, kSlot));
    const std::vector<uint64_t> expected{0,      kSlot + 3 * kBlock, kSlot + 2 * kBlock, kSlot + kBlock, kSlot,
                                         kChunk, 2 * kChunk};
    CHECK(begun() == expected);
}

void promotion_uses_lanes_that_guesses_may_not() {
    Bench bench({3, 1});
    shut();
    const SharedRecord guess = bench.submit(0, kSlot, 0, ReadClass::kPrefetch);
    await_begun(1);
    settle_down();
    CHECK(begun().size() == 1);
    CHECK(bench.reader.promote(guess));
    await_begun(3);
    open_up();
    CHECK(wait_for(guess) == ReadState::kWhole);
}

void interrupted_and_short_reads_go_on() {
    for (const int step : {-EINTR, 4096, 5000, 12'288}) {
        Bench bench({1, 1});
        shut();
        disk.script.assign(step < 0 ? 3 : 40, step);
        open_up();
        CHECK(wait_for(bench.submit(1000, 60'000, 0)) == ReadState::kWhole);
        CHECK(bench.holds(0, 1000, 60'000));
        for (uint64_t offset : begun()) CHECK(offset % kBlock == 0);
        CHECK(begun().size() > 3);
    }
}

void a_failure_says_where_and_spares_the_others() {
    Bench bench({1, 1});
    shut();
    disk.script = {0, 0, 0, -EIO};
    const std::vector<Part> parts{bench.file.part(0, kBlock, bench.memory.slots[0]),
                                  bench.file.part(kSlot, kSlot, bench.memory.slots[1])};
    const SharedRecord before = bench.block(2), broken = bench.reader.submit(parts, kBlock + kSlot, ReadClass::kDemand),
                       after = bench.block(3);
    open_up();
    CHECK(wait_for(broken) == ReadState::kFailed);
    CHECK(broken->failure.part == 1 && broken->failure.error == EIO && broken->failure.offset == kSlot + kChunk);
    CHECK(wait_for(before) == ReadState::kWhole && wait_for(after) == ReadState::kWhole);
    CHECK(begun().size() == 5);  // without the last chunk of the broken one
    CHECK(bench.reader.records() == 2 && bench.reader.bytes_read() == 2 * kBlock);
}

void a_failed_record_is_settled_when_no_lane_has_it() {
    Bench bench({2, 1});
    shut();
    disk.script = {-EIO, -EIO};
    const SharedRecord record = bench.submit(0, kSlot, 0);
    await_begun(2);
    let_through(1);
    settle_down();
    CHECK(record->outcome.state() == ReadState::kUnderWay);
    open_up();
    CHECK(wait_for(record) == ReadState::kFailed);
    CHECK(begun().size() == 2);
}

void files_that_changed_or_are_gone_fail() {
    Bench bench({2, 1});
    open_up();
    CHECK(wait_for(bench.submit(kFileBytes - 5000, 5000, 0)) == ReadState::kWhole);
    CHECK(ftruncate(bench.file.fd, 2 * kChunk) == 0);
    const SharedRecord beyond = bench.submit(kFileBytes - 5000, 5000, 0), within = bench.submit(0, 5000, 1);
    CHECK(wait_for(beyond) == ReadState::kFailed && beyond->failure.error == 0);
    CHECK(wait_for(within) == ReadState::kFailed && within->failure.error == 0);
    Part part = bench.file.part(0, 5000, bench.memory.slots[0]);
    part.fd = -1;
    const SharedRecord nowhere = bench.reader.submit({part}, 5000, ReadClass::kDemand);
    CHECK(wait_for(nowhere) == ReadState::kFailed && nowhere->failure.error == EBADF);
    CHECK(bench.reader.records() == 1);
}

void closing_ends_what_has_begun_and_nothing_else() {
    Bench bench({2, 1});
    shut();
    const SharedRecord running = bench.submit(0, kSlot, 0), queued = bench.submit(kSlot, kSlot, 1),
                       guess = bench.block(2, ReadClass::kPrefetch);
    await_begun(2);
    std::thread closer([&] { bench.reader.close(); });
    CHECK(wait_for(queued) == ReadState::kClosed && wait_for(guess) == ReadState::kClosed);
    CHECK(throws<ReaderError>([&] { bench.block(3); }));
    std::vector<moert::Wanted> wanted(2);
    for (size_t i = 0; i < 2; i++) wanted[i].parts = {bench.file.part(0, kSlot, bench.memory.slots[i + 3])};
    CHECK(throws<ReaderError>([&] { bench.reader.submit(std::move(wanted), ReadClass::kDemand); }));
    CHECK(running->outcome.state() == ReadState::kUnderWay);
    open_up();
    closer.join();
    CHECK(running->outcome.state() == ReadState::kWhole);
    CHECK(bench.holds(0, 0, kSlot));
    CHECK(begun().size() == 3 && bench.memory.slots[1][0] == 0xEE);
    bench.reader.close();
    CHECK(throws<ReaderError>([&] { bench.block(3); }));
    CHECK(!bench.reader.cancel(queued) && !bench.reader.promote(guess));
}

void a_slow_disk_does_not_hold_up_another() {
    Bench bench({2, 1});
    const File other(true);
    CHECK(other.identity.device != bench.file.identity.device);
    shut(bench.file.fd);
    std::vector<SharedRecord> slow;
    for (size_t i = 0; i < 4; i++) slow.push_back(bench.submit(i * kSlot, kSlot, i));
    await_begun(2);
    const Part fast = other.part(5, kSlot - 9, bench.memory.slots[4]);
    const SharedRecord quick = bench.reader.submit({fast}, kSlot - 9, ReadClass::kDemand);
    CHECK(wait_for(quick) == ReadState::kWhole);
    CHECK(slow[0]->outcome.state() == ReadState::kUnderWay);
    const SharedRecord both = bench.reader.submit(
        {other.part(kSlot, kSlot, bench.memory.slots[5]), bench.file.part(0, 100, bench.memory.slots[6])}, kSlot + 100,
        ReadClass::kPrefetch);
    await_begun(2 + 3 + 3);
    settle_down();
    CHECK(both->outcome.state() == ReadState::kUnderWay && !bench.reader.cancel(both));
    CHECK(bench.reader.promote(both));
    open_up();
    CHECK(wait_for(both) == ReadState::kWhole);
    CHECK(std::memcmp(bench.memory.slots[4] + 5, other.content.data() + 5, kSlot - 9) == 0);
    CHECK(std::memcmp(bench.memory.slots[5], other.content.data() + kSlot, kSlot) == 0 && bench.holds(6, 0, 100));
    for (const SharedRecord& record : slow) CHECK(wait_for(record) == ReadState::kWhole);
}

void lanes_can_change() {
    Bench bench({1, 1});
    const uint64_t device = bench.file.identity.device;
    shut();
    std::vector<SharedRecord> records;
    for (size_t i = 0; i < 12; i++) records.push_back(bench.block(i));
    await_begun(1);
    bench.reader.set_lanes(device, {3, 1});
    await_begun(3);
    settle_down();
    CHECK(begun().size() == 3);
    bench.reader.set_lanes(device, {2, 1});
    let_through(1);
    settle_down();
    CHECK(begun().size() == 3);
    let_through(1);
    await_begun(4);
    bench.reader.set_lanes(device, {0, 0});
    let_through(2);
    settle_down();
    CHECK(begun().size() == 4);
    bench.reader.set_lanes(device, {4, 2});
    open_up();
    for (const SharedRecord& record : records) CHECK(wait_for(record) == ReadState::kWhole);
}

void saturation_is_counted_while_all_lanes_are_busy() {
    Bench bench({4, 2});
    shut();
    open_up();
    disk.delay_ms = 10;
    for (int i = 0; i < 5; i++) wait_for(bench.submit(0, kSlot, 0));  // three chunks for four lanes
    CHECK(bench.reader.saturation(0, 1).empty());
    std::vector<SharedRecord> records;
    for (size_t i = 0; i < 40; i++) records.push_back(bench.submit(0, kSlot, i % 16));
    for (const SharedRecord& record : records) wait_for(record);
    disk.delay_ms = 0;
    CHECK(bench.reader.saturation(1000, 0).empty() && bench.reader.saturation(0, 1e12).empty());
    const auto found = bench.reader.saturation(0.1, 1e6);
    CHECK(found.size() == 1);
    if (found.size() == 1) {
        CHECK(found[0].device == bench.file.identity.device && found[0].lanes == 4);
        // Four chunks in flight for at least 10 ms each; 120 in all, without what does not fill the lanes.
        const double chunks = found[0].nbytes / kChunk;
        CHECK(chunks > 60 && chunks < 120.01);
        CHECK(chunks / found[0].seconds <= 4 / 0.0099);
        CHECK(found[0].seconds < bench.clock->seconds());
    }
    CHECK(bench.reader.saturation(0, 1).empty());
}

size_t tasks_of_this_process() {
    size_t count = 0;
    FILE* status = std::fopen("/proc/self/status", "r");
    char line[256];
    while (std::fgets(line, sizeof line, status) != nullptr) {
        if (std::strncmp(line, "Threads:", 8) == 0) count = std::strtoul(line + 8, nullptr, 10);
    }
    std::fclose(status);
    return count;
}

void threads_start_as_needed_and_end() {
    const size_t before = tasks_of_this_process();
    {
        Bench bench({4, 2});
        CHECK(tasks_of_this_process() == before);
        shut();
        open_up();
        wait_for(bench.block(0));
        CHECK(tasks_of_this_process() == before + 1);
        for (int round = 0; round < 50; round++) {
            wait_for(bench.submit(0, kSlot, 0));
            wait_for(bench.block(1));
        }
        const size_t most = tasks_of_this_process();
        CHECK(most > before + 1 && most <= before + 4);
    }
    await("threads to end", [&] { return tasks_of_this_process() == before; });
}

void waiting_ends_in_time() {
    Bench bench({1, 1});
    shut();
    const SharedRecord record = bench.block(0);
    const auto began = Clock::now();
    bool over = false;
    while (Clock::now() - began < milliseconds(50)) over = record->outcome.wait(milliseconds(10));
    CHECK(!over && Clock::now() - began < milliseconds(5000));
    std::vector<std::thread> waiting;
    std::atomic<int> woken{0};
    for (int i = 0; i < 3; i++) {
        waiting.emplace_back([&] {
            while (!record->outcome.wait(std::chrono::seconds(60))) {
            }
            woken++;
        });
    }
    settle_down();
    CHECK(woken == 0);
    open_up();
    const auto opened = Clock::now();
    for (std::thread& thread : waiting) thread.join();
    CHECK(woken == 3 && Clock::now() - opened < std::chrono::seconds(30));
}

void a_fork_is_refused() {
    Bench bench({2, 1});
    shut();
    open_up();
    const SharedRecord record = bench.block(0);
    wait_for(record);
    const pid_t child = fork();
    if (child == 0) {
        const bool refused = throws<ReaderError>([&] { bench.block(1); }) &&
                             throws<ReaderError>([&] { bench.reader.cancel(record); }) &&
                             throws<ReaderError>([&] { bench.reader.promote(record); });
        bench.reader.close();
        _exit(refused && bench.reader.in_fork() ? 0 : 1);
    }
    int status = -1;
    waitpid(child, &status, 0);
    CHECK(status == 0);
    CHECK(wait_for(bench.block(1)) == ReadState::kWhole);
}

void what_follows_a_read_takes_no_lane() {
    Bench bench({1, 1});
    shut();
    open_up();
    std::atomic<bool> may_end{false}, has_begun{false}, has_ended{false};
    const SharedRecord first =
        bench.reader.submit({bench.file.part(0, kBlock, bench.memory.slots[0])}, kBlock, ReadClass::kDemand, [&] {
            has_begun = true;
            await("leave to end", [&] { return may_end.load(); });
            has_ended = true;
        });
    const SharedRecord second = bench.block(1);
    CHECK(wait_for(second) == ReadState::kWhole);
    await("what follows", [&] { return has_begun.load(); });
    CHECK(wait_for(bench.block(2)) == ReadState::kWhole);
    CHECK(first->outcome.state() == ReadState::kUnderWay);
    CHECK(!bench.reader.cancel(first) && !bench.reader.promote(first));
    std::thread closing([&] { bench.reader.close(); });
    settle_down();
    CHECK(first->outcome.state() == ReadState::kUnderWay);
    may_end = true;
    closing.join();
    CHECK(has_ended && first->outcome.state() == ReadState::kWhole);
    CHECK(bench.reader.records() == 3);
}

void nothing_is_done_after_a_read_that_failed() {
    Bench bench({2, 1});
    shut();
    disk.script = {-EIO};
    open_up();
    bool followed = false;
    const SharedRecord record = bench.reader.submit({bench.file.part(0, kBlock, bench.memory.slots[0])}, kBlock,
                                                    ReadClass::kDemand, [&] { followed = true; });
    CHECK(wait_for(record) == ReadState::kFailed);
    CHECK(!followed);
}

void nothing_is_lost_between_threads(int rounds) {
    Bench bench({3, 1});
    shut();
    open_up();
    const File other(true);
    std::atomic<uint64_t> whole{0}, cancelled{0}, nbytes_whole{0};
    std::vector<std::thread> threads;
    for (unsigned seed = 0; seed < 4; seed++) {
        threads.emplace_back([&, seed] {
            std::mt19937 random(seed);
            const Memory memory(4);
            for (int round = 0; round < rounds; round++) {
                struct Wanted {
                    SharedRecord record;
                    const File* file;
                    size_t offset, nbytes;
                    std::shared_ptr<int> followed;  // how often something was done after it; null: nothing is
                };
                std::vector<Wanted> wanted;
                for (size_t slot = 0; slot < 4; slot++) {
                    const File& file = random() % 2 == 0 ? bench.file : other;
                    const size_t nbytes = 1 + random() % (random() % 4 == 0 ? kSlot : 20'000);
                    const size_t offset = random() % (kFileBytes - nbytes);
                    const auto kind = static_cast<ReadClass>(random() % 3);
                    const auto followed = random() % 2 == 0 ? std::make_shared<int>(0) : nullptr;
                    moert::AfterRead after;
                    if (followed) after = [followed] { ++*followed; };
                    wanted.push_back(
                        {bench.reader.submit({file.part(offset, nbytes, memory.slots[slot])}, nbytes, kind, after),
                         &file, offset, nbytes, followed});
                    if (random() % 4 == 0) {
                        bench.reader.promote(wanted[random() % wanted.size()].record,
                                             static_cast<ReadClass>(random() % 3));
                    }
                    if (random() % 8 == 0) bench.reader.cancel(wanted[random() % wanted.size()].record);
                    if (random() % 8 == 0) bench.reader.give_up(wanted[random() % wanted.size()].record);
                    if (random() % 16 == 0) bench.reader.set_lanes(file.identity.device, {1 + int(random() % 5), 1});
                    if (random() % 16 == 0) bench.reader.saturation(0, 0);
                }
                for (size_t slot = 0; slot < 4; slot++) {
                    const Wanted& one = wanted[slot];
                    if (wait_for(one.record) == ReadState::kCancelled) {
                        CHECK(!one.followed || *one.followed == 0);
                        cancelled++;
                        continue;
                    }
                    CHECK(one.record->outcome.state() == ReadState::kWhole);
                    CHECK(!one.followed || *one.followed == 1);
                    CHECK(std::memcmp(memory.slots[slot] + one.offset % kBlock, one.file->content.data() + one.offset,
                                      one.nbytes) == 0);
                    whole++;
                    nbytes_whole += one.nbytes;
                }
            }
        });
    }
    for (std::thread& thread : threads) thread.join();
    CHECK(whole + cancelled == static_cast<uint64_t>(rounds) * 16);
    CHECK(bench.reader.records() == whole && bench.reader.bytes_read() == nbytes_whole);
    CHECK(cancelled > 0);
}

}  // namespace

int main(int argc, char** argv) {
    const int rounds = argc > 1 ? std::atoi(argv[1]) : 100;
    chunks_cover_a_part_once();
    any_range_has_the_files_bytes();
    classes_in_order_and_each_in_its_own();
    lanes_share_a_record_and_then_the_next();
    guesses_leave_lanes_free();
    many_at_once_are_read_in_order_by_all_lanes();
    sleeping_threads_are_woken_whatever_changes();
    only_what_has_not_begun_is_cancelled();
    what_is_given_up_is_read_no_further();
    the_promoted_go_behind_the_demands();
    what_is_raised_goes_to_its_class();
    promotion_uses_lanes_that_guesses_may_not();
    interrupted_and_short_reads_go_on();
    a_failure_says_where_and_spares_the_others();
    a_failed_record_is_settled_when_no_lane_has_it();
    files_that_changed_or_are_gone_fail();
    closing_ends_what_has_begun_and_nothing_else();
    a_slow_disk_does_not_hold_up_another();
    lanes_can_change();
    saturation_is_counted_while_all_lanes_are_busy();
    threads_start_as_needed_and_end();
    waiting_ends_in_time();
    a_fork_is_refused();
    what_follows_a_read_takes_no_lane();
    nothing_is_done_after_a_read_that_failed();
    nothing_is_lost_between_threads(rounds);
    if (failures == 0) std::puts("all hold");
    return failures == 0 ? 0 : 1;
}
