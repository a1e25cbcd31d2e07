import java.io.FileOutputStream;
import java.io.IOException;
import java.io.RandomAccessFile;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.StandardCopyOption;
import java.security.MessageDigest;
import java.security.NoSuchAlgorithmException;
import java.security.SecureRandom;
import java.util.Arrays;
import java.util.HexFormat;

/** Java: `java Counter.java DIR`. Lines appended to a file, and a chain in memory. */
public final class Counter {
    private static final int LINE = 12 + 1 + 16 + 1;

    private final Path directory;
    private final RandomAccessFile progress;
    private final Path logPath;
    private final FileOutputStream log;
    private final byte[] first = new byte[8];
    private byte[] last = first;
    private int count;
    private String failure;
    private volatile boolean asked;

    private Counter(Path directory) throws IOException {
        this.directory = directory;
        progress = new RandomAccessFile(directory.resolve("progress").toFile(), "rw");
        logPath = directory.resolve("log");
        log = new FileOutputStream(logPath.toFile(), true);
        log.getChannel().truncate(0);
        new SecureRandom().nextBytes(first);
    }

    public static void main(String[] arguments) throws Exception {
        Counter counter = new Counter(Path.of(arguments[0]).toAbsolutePath());
        Thread worker = new Thread(counter::run, "counter");
        Runtime.getRuntime().addShutdownHook(new Thread(() -> counter.end(worker)));
        counter.show();
        counter.say("ready", ProcessHandle.current().pid() + "\ncounts in Java");
        worker.start();
        worker.join();
        System.exit(1); // by itself it only ends when something is wrong; the hook says what
    }

    private void run() {
        try {
            while (!asked) {
                cutBack();
                last = link(last, count);
                log.write(line(count, last));
                count++;
                show();
                Thread.sleep(5);
            }
            cutBack();
            check();
        } catch (IOException | InterruptedException | IllegalStateException exc) {
            failure = exc.getMessage();
        }
    }

    /** Judge. A JVM runs this on SIGTERM; only halt gives it the exit code. */
    private void end(Thread worker) {
        asked = true;
        try {
            worker.join();
            say("verdict", failure == null ? "PASS" : "FAIL: " + failure);
        } catch (IOException | InterruptedException exc) {
            Runtime.getRuntime().halt(2);
        }
        Runtime.getRuntime().halt(failure == null ? 0 : 1);
    }

    /**
     * What is in the file behind what memory knows must be what would come next; it is cut off.
     * Behind that our last line may be once more: the image was made just before it was written.
     */
    private void cutBack() throws IOException {
        long known = (long) count * LINE;
        int surplus = (int) (Files.size(logPath) - known);
        expect(surplus >= 0, "the log has lost its last " + -surplus + " bytes");
        if (surplus == 0) {
            return;
        }
        String found = Files.readString(logPath).substring((int) known);
        String written = count > 0 ? new String(line(count - 1, last)) : "none";
        while (found.endsWith(written)) {
            found = found.substring(0, found.length() - LINE);
        }
        StringBuilder coming = new StringBuilder();
        byte[] chain = last;
        for (int number = count; coming.length() < found.length(); number++) {
            chain = link(chain, number);
            coming.append(new String(line(number, chain)));
        }
        boolean follows = coming.toString().startsWith(found);
        expect(follows, "the log goes on wrongly after line " + count);
        log.getChannel().truncate(known);
    }

    private void check() throws IOException {
        byte[] chain = first;
        byte[] found = Files.readAllBytes(logPath);
        for (int number = 0; number < count; number++) {
            chain = link(chain, number);
            int at = number * LINE;
            boolean same = Arrays.equals(found, at, at + LINE, line(number, chain), 0, LINE);
            expect(same, "line " + number + " of the log is wrong");
        }
        expect(Arrays.equals(chain, last), "the chain in memory is broken");
    }

    private void show() throws IOException {
        progress.seek(0);
        progress.write(String.format("%020d%n", count).getBytes(StandardCharsets.US_ASCII));
    }

    private void say(String name, String text) throws IOException {
        Path fresh = directory.resolve("." + name + ".new");
        Files.writeString(fresh, text + "\n");
        Files.move(fresh, directory.resolve(name), StandardCopyOption.ATOMIC_MOVE);
    }

    private static byte[] link(byte[] previous, int number) {
        try {
            MessageDigest digest = MessageDigest.getInstance("SHA-1");
            digest.update(previous);
            digest.update((byte) number);
            digest.update((byte) (number >> 8));
            digest.update((byte) (number >> 16));
            return Arrays.copyOf(digest.digest(), 8);
        } catch (NoSuchAlgorithmException exc) {
            throw new IllegalStateException(exc);
        }
    }

    private static byte[] line(int number, byte[] chain) {
        String text = String.format("%012d %s%n", number, HexFormat.of().formatHex(chain));
        return text.getBytes(StandardCharsets.US_ASCII);
    }

    private static void expect(boolean holds, String sentence) {
        if (!holds) {
            throw new IllegalStateException(sentence);
        }
    }
}
